"""Costs and limits that the warm-up measures, on a device that is numbers."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dd_core.plan import few_steps, hybrid, one_step, teacher
from server.devices.messages import Done, Failed, Forward
from server.devices.warmup import warm_up, warmup_passes
from server.scheduling.costs import CostTable, Work, WorkCosts, buckets_up_to
from server.scheduling.jobs import stages
from tests.server.helpers import running

Kept = dict[Work, WorkCosts]
PLANS = [one_step(8)]
WORK = Work("tiny", "student")
DECODE = Work("tiny", "decode")
DECODING = 1e-6  # seconds an image


class Numbers:
    """A device whose passes take what `seconds(bucket, turn)` says; `turn` counts those of a bucket."""

    def __init__(self, seconds: Callable[[int, int], float], memory: int = 8) -> None:
        self.seconds = seconds
        self.memory = memory  # images that it has room for
        self.passes: Counter[int] = Counter()

    async def run(self, command: Forward) -> Done | Failed:
        self.passes[command.bucket] += 1
        if command.bucket > self.memory:
            return Failed(True, "no memory")
        decoding = DECODING * command.bucket if command.finishing else 0.0
        return Done(self.seconds(command.bucket, self.passes[command.bucket]), decoding, {})

    def drop(self, numbers: Sequence[int]) -> None:
        assert numbers


def warmed(
    seconds: Callable[[int, int], float],
    kept: Kept | None = None,
    *,
    every_size: bool = False,
    memory: int = 8,
) -> tuple[CostTable, Numbers]:
    costs, device = CostTable(buckets_up_to(8)), Numbers(seconds, memory)
    passes, numbers = warmup_passes("tiny", PLANS), itertools.count(-1, -1)
    found: Kept = {} if kept is None else kept
    asyncio.run(warm_up(passes, 0, costs, device, numbers, found, every_size=every_size))
    return costs, device


def usual(bucket: int, _: int) -> float:
    return 0.01 + 0.001 * bucket


def kept_costs() -> Kept:
    kept: Kept = {}
    warmed(usual, kept)
    return kept


def test_every_kind_of_pass_is_measured_once() -> None:
    """Of two students' plans one, of each teacher's its own, with what they decode."""
    plans = [teacher(8), few_steps(8, 4), hybrid(8, 2, 4), one_step(8)]
    found = warmup_passes("tiny", plans)
    assert [step.plan.cost for step in found] == sorted(step.plan.cost for step in found)
    works = [step.stage.work for step in found]
    assert len(set(works)) == len(works)
    wanted = {stage.work for plan in plans for stage in stages("tiny", plan)} - {Work("tiny", "decode")}
    assert set(works) == wanted


def test_processes_on_a_cpu_share_what_there_is_to_measure(bundle_folder: Path) -> None:
    with running(bundle_folder, device="cpu,cpu", max_batch=2) as live:
        pool = live.state.pool
        assert pool is not None
        first, second = pool._workers
        costs = first.scheduler.costs
        assert costs is second.scheduler.costs
        [model] = live.state.catalog.models.values()
        steps = warmup_passes(model.name, [preset.plan for preset in model.presets if preset.offered])
        assert len(steps) > 2 and all(costs.seconds(step.stage.work, 1) > 0 for step in steps)
        assert [*pool._shares(steps)] == [steps[::2], steps[1::2]]
        assert [*pool._shares(steps[:1])] == [steps[:1], steps[:1]], "never nothing"


def test_a_size_that_was_disturbed_once_is_not_given_up() -> None:
    """It would never be tried again, and the server be as slow as with single images for good."""
    costs, device = warmed(lambda bucket, turn: 0.1 if bucket == 2 and turn <= 4 else 0.01 + 0.001 * bucket)
    assert costs.largest(WORK) == 8 and costs.best(WORK, 8) == 8
    assert costs.seconds(WORK, 2) == 0.012
    assert device.passes[2] > device.passes[1] == device.passes[8] == 2


def test_two_sizes_that_gain_nothing_end_the_search() -> None:
    costs, device = warmed(lambda bucket, _: 0.01 * bucket)
    assert costs.largest(WORK) == 4 and costs.best(WORK, 8) == 1
    assert device.passes[2] == device.passes[4] == 8 and not device.passes[8]


def test_one_size_that_gains_nothing_is_passed_over() -> None:
    costs, _ = warmed(lambda bucket, _: 0.01 if bucket == 1 else 0.02 + 0.001 * bucket)
    assert costs.largest(WORK) == 8 and costs.best(WORK, 8) == 8


def test_a_long_pass_is_measured_once_and_not_with_more_images() -> None:
    costs, device = warmed(lambda bucket, _: 0.6 + 0.6 * bucket)
    assert device.passes == {1: 2} and costs.largest(WORK) == 1


def test_costs_are_kept_as_they_were_measured() -> None:
    kept: Kept = {}
    costs, _ = warmed(usual, kept)
    assert kept == {WORK: costs.measured(WORK), DECODE: costs.measured(DECODE)}
    assert kept[WORK].seconds == {bucket: usual(bucket, 0) for bucket in (1, 2, 4, 8)}
    assert kept[WORK].largest == 8


@pytest.mark.parametrize(("every_size", "sizes"), [(False, [1, 8]), (True, [1, 2, 4, 8])], ids=["CPU", "GPU"])
def test_costs_that_hold_are_checked_and_not_measured(every_size: bool, sizes: list[int]) -> None:
    """On a CPU the smallest size and the best one; on a GPU every size runs, since it may be new to it."""
    kept = kept_costs()
    before = dict(kept)
    costs, device = warmed(lambda bucket, _: 1.4 * usual(bucket, 0), kept, every_size=every_size)
    assert device.passes == dict.fromkeys(sizes, 2)
    assert kept == before == {work: costs.measured(work) for work in before}


def test_what_was_found_useless_is_not_tried_again() -> None:
    kept: Kept = {}
    warmed(lambda bucket, _: 0.01 * bucket, kept)
    costs, device = warmed(lambda bucket, _: 0.01 * bucket, kept, every_size=True)
    assert device.passes == {1: 2, 2: 2, 4: 2} and costs.largest(WORK) == 4


def test_a_disturbed_check_is_tried_again() -> None:
    """Twice slower once, then as it was."""
    kept = kept_costs()
    before = dict(kept)
    _, device = warmed(lambda bucket, turn: usual(bucket, 0) * (2 if turn <= 4 else 1), kept)
    assert device.passes == {1: 6, 8: 6} and kept == before


@pytest.mark.parametrize(("factor", "tries"), [(2.0, 4), (0.5, 1)], ids=["slower", "faster"])
def test_costs_that_hold_no_more_are_measured_anew(factor: float, tries: int) -> None:
    """Also those that were measured while something disturbed: the machine is faster than it seemed."""
    kept = kept_costs()
    costs, device = warmed(lambda bucket, _: factor * usual(bucket, 0), kept)
    assert device.passes == {1: 2 * tries + 2, 2: 2, 4: 2, 8: 2}
    assert kept[WORK] == costs.measured(WORK)
    assert kept[WORK].seconds == {bucket: factor * usual(bucket, 0) for bucket in (1, 2, 4, 8)}


def test_a_work_whose_decoding_is_not_known_is_measured() -> None:
    kept = kept_costs()
    del kept[DECODE]
    _, device = warmed(usual, kept)
    assert device.passes == dict.fromkeys((1, 2, 4, 8), 2) and DECODE in kept


def test_a_size_that_failed_is_tried_at_the_next_start() -> None:
    """Another program may have had the memory."""
    kept: Kept = {}
    costs, _ = warmed(usual, kept, memory=2)
    assert costs.largest(WORK) == 2 and not kept
    kept = kept_costs()
    costs, device = warmed(usual, kept, memory=2)
    assert costs.largest(WORK) == 2 and not kept and not device.passes[4] > 1
    costs, _ = warmed(usual, kept)
    assert costs.largest(WORK) == 8 and kept == kept_costs()
