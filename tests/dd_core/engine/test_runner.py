"""Runners against `sample_images`: eager bit by bit, graphs on static memory with images that come and go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dd_core import plan
from dd_core.bundle import Bundle
from dd_core.condition import ClassCondition
from dd_core.engine.arithmetic import EXACT32
from dd_core.engine.graphs import EXACT_ROWS, NOBODY, GraphRunner, Row, chunks_of
from dd_core.engine.prepared import prepare
from dd_core.engine.runner import EagerRunner, Slots
from dd_core.sampling import Sampler, sample_images
from tests.dd_core.engine.passes import PLANS, SEED, Image, put, run
from tests.dd_core.engine.recorded import RecordedGraphs
from tests.tiny_var import VAR, tiny_var_models


@pytest.fixture(params=PLANS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sampler(family: str, bundle: Bundle) -> Sampler:
    if family == "llamagen":
        return prepare(bundle.sampler, EXACT32)
    tokenizer, student, teacher = tiny_var_models()
    made = Sampler(VAR.layout, tokenizer, student, teacher)
    return prepare(replace(made, draw=replace(made.draw, guidance=2.0)), EXACT32)


def _expected(sampler: Sampler, image: Image) -> Tensor:
    number, chosen, label = image
    return sample_images(sampler, chosen, [label], [(SEED, number)])[0]


def _near(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the last bits of floats, which other shapes of batches round differently."""
    return int((found.int() - expected.int()).abs().max()) <= 1


def test_an_eager_runner_keeps_the_bytes(sampler: Sampler, family: str) -> None:
    runner = EagerRunner(sampler, 2)
    for n, chosen in enumerate(PLANS[family]):
        images = [(10 * n + i, chosen, (n + 3 * i) % 10) for i in range(3)]
        put(runner, images)
        run(runner, images)
        pixels, good = runner.decode([number for number, _, _ in images])
        assert good.all()
        for image, found in zip(images, pixels, strict=True):
            assert torch.equal(found, _expected(sampler, image)), chosen.name
    assert len(runner.held) == 3 * len(PLANS[family])
    runner.drop([*runner.held])
    assert runner.held == set()


@pytest.mark.parametrize("exact", [True, False])
def test_graphs_make_the_images_of_any_images_that_come(sampler: Sampler, family: str, exact: bool) -> None:
    """The second round replays what the first recorded, for other images in other slots."""
    graphs = RecordedGraphs()
    runner = GraphRunner(replace(sampler, exact=exact), graphs, 16)
    for turn in range(3):
        for n, chosen in enumerate(PLANS[family]):
            count = 3 - (turn == 2)  # idle rows hold what was there before
            images = [(100 * turn + 10 * n + i, chosen, (turn + n + 3 * i) % 10) for i in range(count)]
            put(runner, images)
            run(runner, images, bucket=4)
            pixels, good = runner.decode([number for number, _, _ in images])
            assert good.all()
            for image, found in zip(images, pixels, strict=True):
                assert _near(found, _expected(sampler, image)), (chosen.name, turn)
            runner.drop([number for number, _, _ in images])
        if turn == 0:
            recorded = graphs.recorded
            assert recorded > 0 and runner.held == set()
        if turn == 1:
            assert graphs.recorded == recorded, "the second round records nothing"
            assert graphs.replayed > 0


def test_exact_graphs_give_the_same_bytes_alone_and_in_any_batch(sampler: Sampler, family: str) -> None:
    runner = GraphRunner(sampler, RecordedGraphs(), 32)
    for n, chosen in enumerate(PLANS[family]):
        images = [(100 * n + i, chosen, (n + i) % 10) for i in range(5)]
        put(runner, images)
        run(runner, images, bucket=8)
        together, _ = runner.decode([number for number, _, _ in images])
        runner.drop([*runner.held])
        for i in (0, 4):
            put(runner, images[i : i + 1])
            run(runner, images[i : i + 1], bucket=1)
            alone, _ = runner.decode([images[i][0]])
            runner.drop([*runner.held])
            assert torch.equal(alone[0], together[i]), chosen.name


def test_jumps_of_several_plans_share_a_pass(sampler: Sampler, family: str) -> None:
    one, two = PLANS[family][:2]
    images = [(0, one, 1), (1, two, 2), (2, two, 3)]
    for exact in (True, False):
        runner = GraphRunner(replace(sampler, exact=exact), RecordedGraphs(), 8)
        put(runner, images)
        runner.advance([1, 2], [0, 0], 2, None)
        runner.advance([0, 1, 2], [0, 1, 1], 4, None)
        pixels, _ = runner.decode([0, 1, 2])
        for image, found in zip(images, pixels, strict=True):
            assert _near(found, _expected(sampler, image))


def test_while_a_model_loads_passes_run_and_record_nothing(sampler: Sampler, family: str) -> None:
    graphs = RecordedGraphs()
    runner = GraphRunner(sampler, graphs, 8)
    for loading in (True, False, False):
        graphs.loading = loading
        for n, chosen in enumerate((PLANS[family][0], PLANS[family][2])):
            images = [(n, chosen, 4)]
            put(runner, images)
            run(runner, images)
            assert _near(runner.decode([n])[0][0], _expected(sampler, images[0]))
            runner.drop([n])
        assert (graphs.recorded == 0) == loading
    assert graphs.replayed > 0


def test_passes_that_cannot_be_recorded_make_the_same_images(sampler: Sampler, family: str) -> None:
    graphs = RecordedGraphs()
    graphs.failing = True
    runner = GraphRunner(sampler, graphs, 8)
    for n, chosen in enumerate(PLANS[family]):
        images = [(n, chosen, 4)]
        put(runner, images)
        run(runner, images)
        assert _near(runner.decode([n])[0][0], _expected(sampler, images[0])), chosen.name
        runner.drop([n])


def test_more_images_than_slots_void_the_graphs_and_no_image(sampler: Sampler, family: str) -> None:
    graphs, chosen = RecordedGraphs(), PLANS[family][0]
    runner = GraphRunner(sampler, graphs, 3)
    images = [(i, chosen, i) for i in range(9)]
    put(runner, images[:2])
    run(runner, images[:2])
    recorded = graphs.recorded
    put(runner, images[2:])
    assert runner.slots.grown == 2
    run(runner, images[2:])
    assert graphs.recorded > recorded, "the first graphs read arrays that are no longer used"
    pixels, _ = runner.decode(range(9))
    for image, found in zip(images, pixels, strict=True):
        assert _near(found, _expected(sampler, image))


def test_a_teacher_batch_that_failed_begins_again(sampler: Sampler) -> None:
    """As the scheduler sends it again: what lies before the segment is as it was."""
    chosen = plan.hybrid(sampler.layout.num_blocks, 1, 3)
    runner, images = GraphRunner(sampler, RecordedGraphs(), 8), [(0, chosen, 1), (1, chosen, 2)]
    put(runner, images)
    runner.advance([0, 1], [0, 0], 2, None)
    runner.advance([0, 1], [1, 1], 2, 99)
    assert 99 in runner.held
    runner.recover(99)
    assert 99 not in runner.held
    for _ in range(chosen.segments[1].stop - chosen.segments[1].start):
        runner.advance([0, 1], [1, 1], 2, 100)
    runner.advance([0, 1], [2, 2], 2, None)
    for image, found in zip(images, runner.decode([0, 1])[0], strict=True):
        assert _near(found, _expected(sampler, image))


def test_chunks_hold_what_may_be_together() -> None:
    rows = [Row(5, 0, 2), Row(6, 3, 3), Row(7, 0, 2), Row(8, 0, 2)]
    assert chunks_of(rows, None, 8) == [[*rows, *[Row(NOBODY, 0, 2)] * 4]]
    assert chunks_of(rows, None, 2) == [rows], "a bucket that is too small is no reason to lose images"
    assert chunks_of(rows, 1, 8) == [[Row(5, 0, 2)], [Row(7, 0, 2)], [Row(8, 0, 2)], [Row(6, 3, 3)]]
    by_twos = chunks_of(rows, 2, 8)
    assert by_twos == [[rows[0], rows[2]], [rows[3], Row(NOBODY, 0, 2)], [rows[1], Row(NOBODY, 3, 3)]]
    assert EXACT_ROWS["student"] == EXACT_ROWS["decode"] == 1, "or a batch's order could show in a picture"


def test_slots_are_used_again_and_keep_their_images(sampler: Sampler) -> None:
    slots = Slots(sampler, 4)
    shape = sampler.layout.num_tokens, sampler.codebook_VC.shape[1]

    def put(*numbers: int) -> None:
        noise = torch.stack([torch.full(shape, float(n)) for n in numbers])
        slots.put(numbers, ClassCondition(torch.tensor(numbers) % 10), noise, noise[..., 0])

    put(1, 2, 3)
    rows = {number: slots.row(number) for number in (1, 2, 3)}
    assert NOBODY not in rows.values()
    slots.drop([2, 77])
    put(4)
    assert slots.row(4) == rows[2] and slots.grown == 0
    put(5, 6)
    assert slots.grown == 1 and len(slots.x_NLC) == 8 and slots.numbers == {1, 3, 4, 5, 6}
    x, cond, noise, uniform = slots.gather(slots.index([3, 6, 1], idle=2))
    assert x[:, 0, 0].tolist() == noise[:, 0, 0].tolist() == uniform[:, 0].tolist() == [3, 6, 1, 0, 0]
    assert isinstance(cond, ClassCondition) and cond.labels_B.tolist() == [3, 6, 1, 0, 0]
