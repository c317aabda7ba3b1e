"""Graphs on a CUDA device: both families, every arithmetic, every size. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Lock, Thread

import pytest
import torch
from torch import Tensor

from dd_core.bundle import load_bundle
from dd_core.engine.arithmetic import choose
from dd_core.engine.cuda import CudaGraphs, settle
from dd_core.engine.graphs import GraphRunner
from dd_core.engine.runner import EagerRunner
from dd_core.runtime import pick_device
from dd_core.sampling import Sampler
from tests.dd_core.engine.passes import PLANS, images_of, pictures, put
from tests.tiny import tiny_bundle
from tests.tiny_var import tiny_var_bundle

BUNDLES = {"var": tiny_var_bundle, "llamagen": tiny_bundle}
ARITHMETICS = ["exact32", "bf16", "fp16"]


@pytest.fixture(scope="module", params=BUNDLES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUNDLES[family](tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module", params=ARITHMETICS)
def sampler(folder: Path, request: pytest.FixtureRequest) -> Sampler:
    device = torch.device("cuda", torch.cuda.current_device())
    settle(device)
    return load_bundle(folder, device, choose(request.param, device)).sampler


def _runner(sampler: Sampler, exact: bool = True, loading: Lock | None = None) -> GraphRunner:
    return GraphRunner(
        replace(sampler, exact=exact), CudaGraphs(sampler.device, loading or Lock()), capacity=128
    )


def _same(found: Tensor, expected: Tensor) -> float:
    """Share of numbers of a pixel that are equal, but for one grey level."""
    return float(((found.int() - expected.int()).abs() <= 1).float().mean())


@pytest.mark.parametrize("exact", [True, False])
def test_a_replay_is_what_it_was_recorded_from(sampler: Sampler, family: str, exact: bool) -> None:
    """Bit by bit, at equal shapes: with the lock taken nothing is recorded, and operations run one by one."""
    loading = Lock()
    graphs, eager = _runner(sampler, exact), _runner(sampler, exact, loading)
    with loading:
        for chosen in PLANS[family]:
            for turn in range(3):
                images = images_of(chosen, 3, first=10 * turn)
                assert torch.equal(pictures(graphs, images, 4), pictures(eager, images, 4)), (chosen, turn)
    assert graphs._passes and not eager._passes


def test_exact_bytes_are_the_same_alone_and_in_any_batch(sampler: Sampler, family: str) -> None:
    runner = _runner(sampler)
    for chosen in PLANS[family]:
        images = images_of(chosen, 11)
        together = pictures(runner, images, 16)
        for size in (1, 2, 5, 8):
            assert torch.equal(pictures(runner, images[:size], size), together[:size]), (chosen.name, size)


def test_images_do_not_depend_on_their_row(sampler: Sampler, family: str) -> None:
    """What the teacher's chunks of exact mode take for granted, in one shape."""
    runner = _runner(sampler, exact=False)
    for chosen in PLANS[family]:
        images = images_of(chosen, 8)
        order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
        found = pictures(runner, [images[i] for i in order], 8)
        assert torch.equal(found, pictures(runner, images, 8)[order]), chosen.name


@pytest.mark.parametrize("bucket", [1, 2, 4, 8, 16, 32, 64])
def test_every_bucket_makes_the_same_images(sampler: Sampler, family: str, bucket: int) -> None:
    """In `fast`, to the last bits: a near tie may fall either way, and in two bytes a number more do."""
    runner, chosen = _runner(sampler, exact=False), PLANS[family][0]
    images = images_of(chosen, bucket)
    found = pictures(runner, images, bucket)
    expected = torch.cat(
        [pictures(_runner(sampler), images[:1], 1), pictures(_runner(sampler), images[-1:], 1)]
    )
    assert _same(found[[0, -1]], expected) > 0.95


def test_a_gpu_draws_the_cpus_images(sampler: Sampler, folder: Path, family: str) -> None:
    cpu = torch.device("cpu")
    host = EagerRunner(load_bundle(folder, cpu, choose("exact32", cpu)).sampler)
    for chosen in PLANS[family][:2]:
        images = images_of(chosen, 8)
        assert _same(pictures(_runner(sampler), images, 8), pictures(host, images)) > 0.9, chosen.name


@pytest.mark.parametrize("exact", [True, False])
def test_a_pass_does_not_wait_for_the_gpu(sampler: Sampler, family: str, exact: bool) -> None:
    """Once recorded; what is decoded has to be waited for."""
    runner, images = _runner(sampler, exact), images_of(PLANS[family][1], 4)
    pictures(runner, images, 4)
    put(runner, images)
    numbers = [number for number, _, _ in images]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for segment in (0, 1):
            runner.advance(numbers, [segment] * 4, 4, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runner.decode(numbers)[1].all()


def test_a_load_beside_a_recording_breaks_neither(sampler: Sampler, folder: Path, family: str) -> None:
    """The capture's mode lets other threads allocate, and the lock keeps a model's load out of it."""
    loading, failures = Lock(), list[BaseException]()

    def load() -> None:
        try:
            for _ in range(5):
                with loading:
                    load_bundle(folder, sampler.device, choose("exact32", sampler.device))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    thread = Thread(target=load)
    thread.start()
    runner = _runner(sampler, False, loading)
    for bucket in (1, 2, 4, 8):
        for chosen in PLANS[family][:3]:
            pictures(runner, images_of(chosen, bucket), bucket)
    thread.join()
    assert failures == []


def test_the_second_gpu_is_as_good_as_the_first(folder: Path, family: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    found = []
    for number in range(2):
        device = pick_device(f"cuda:{number}")
        settle(device)
        runner = _runner(load_bundle(folder, device, choose("exact32", device)).sampler)
        found.append(pictures(runner, images_of(PLANS[family][0], 3)))
    settle(pick_device("cuda:0"))
    assert torch.equal(*found)
