"""Costs and limits that the warm-up measures, on a device that is numbers."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dd_core.plan import few_steps, hybrid, one_step, teacher
from server.devices.messages import Done, Failed, Forward
from server.devices.warmup import warm_up, warmup_passes
from server.scheduling.costs import CostTable, Work, buckets_up_to
from server.scheduling.jobs import stages
from tests.server.helpers import running

PLANS = [one_step(8)]
WORK = Work("tiny", "student")


class Numbers:
    """A device whose passes take what `seconds(bucket, turn)` says; `turn` counts those of a bucket."""

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        self.seconds = seconds
        self.passes: Counter[int] = Counter()

    async def run(self, command: Forward) -> Done | Failed:
        self.passes[command.bucket] += 1
        return Done(self.seconds(command.bucket, self.passes[command.bucket]), 0.0, {})

    def drop(self, numbers: Sequence[int]) -> None:
        assert numbers


def warmed(seconds: Callable[[int, int], float]) -> tuple[CostTable, Numbers]:
    costs, device = CostTable(buckets_up_to(8)), Numbers(seconds)
    asyncio.run(warm_up(warmup_passes("tiny", PLANS), 0, costs, device, itertools.count(-1, -1)))
    return costs, device


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
