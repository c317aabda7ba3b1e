"""Same bytes in any batch: rows of products, and one thread an image (order, errors, torch's own threads)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core import plan
from dd_core.bundle import Bundle
from dd_core.exact import ImageByImage, exact_rows, on_one_thread_each
from dd_core.sampling import decode, sample_codes


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order_and_every_image_has_one_thread(threads: int) -> None:
    inside: set[tuple[int, bool]] = set()

    def double(image: Tensor) -> Tensor:
        inside.add((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        return image * 2

    with torch.inference_mode():
        found = on_one_thread_each(double, list(torch.arange(20)))
    assert [int(x) for x in found] == list(range(0, 40, 2))
    assert inside == {(1, True)}
    assert torch.get_num_threads() == threads
    late: list[int] = []
    other = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert late == [threads], "threads that come later have all of torch's too"


@pytest.mark.usefixtures("two_threads")
def test_images_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2)
    on_one_thread_each(lambda image: image + meeting.wait(timeout=10), list(torch.arange(2)))


def test_an_error_of_an_image_is_raised(threads: int) -> None:
    def fail(image: Tensor) -> Tensor:
        if image == 3:
            raise MemoryError("no room")
        return image

    with pytest.raises(MemoryError, match="no room"):
        on_one_thread_each(fail, list(torch.arange(5)))
    assert len(on_one_thread_each(lambda image: image, list(torch.arange(5)))) == 5


@torch.inference_mode()
def test_pictures_are_the_same_however_many_and_on_however_many_threads(
    threads: int,
    bundle: Bundle,
) -> None:
    sampler = bundle.sampler
    codes = sample_codes(
        sampler, plan.one_step(sampler.layout.num_blocks), [0] * 7, [(1, i) for i in range(7)]
    )
    all_at_once, fine = decode(sampler, codes)
    assert fine.all() and len({picture.numpy().tobytes() for picture in all_at_once}) == 7
    for picture, one in zip(all_at_once, codes.split(1), strict=True):
        assert torch.equal(decode(sampler, one)[0][0], picture)


class _ByThreads:
    """A tokenizer whose pictures depend on the threads that draw them."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def to_image(self, codes_BLC: Tensor) -> Tensor:
        return torch.full((len(codes_BLC), 3, 4, 4), torch.get_num_threads() / 8)


@pytest.mark.usefixtures("two_threads")
def test_what_depends_on_threads_is_drawn_on_one(bundle: Bundle) -> None:
    sampler = bundle.sampler
    assert ImageByImage(sampler.tokenizer, sampler.layout.num_tokens).any_threads
    shaky = replace(sampler, tokenizer=_ByThreads(sampler.tokenizer))  # type: ignore[arg-type]
    assert isinstance(shaky.to_images, ImageByImage) and not shaky.to_images.any_threads
    codes = torch.zeros(3, sampler.layout.num_tokens, sampler.codebook_VC.shape[1])
    assert torch.equal(decode(shaky, codes[:1])[0][0], decode(shaky, codes)[0][0])


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_a_row_of_a_product_rounds_alike_in_every_batch(threads: int) -> None:
    """With 18 rows for 16 threads some thread had one or two, which is another kernel."""
    weight, rows = torch.randn(192, 64), torch.randn(48, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = F.linear(rows, weight)
        for used in (1, 2, 3, 5, 15, 17, 18, 19, 25, 26, 34):
            assert torch.equal(F.linear(rows[: exact_rows(used)], weight)[:used], whole[:used]), used
    finally:
        torch.set_num_threads(before)
    assert [exact_rows(n) for n in (1, 16, 17, 127, 128, 681)] == [16, 16, 20, 128, 128, 681]
