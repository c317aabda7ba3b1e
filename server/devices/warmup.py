"""Run every kind of pass of a model once in every size of batch, and measure it.

    plans ─ warmup_passes ─▶ a WarmupPass for each kind of pass ─ warm_up ─▶ CostTable
                                 costs of an earlier start ─ check ─┘

A size is warmed up only while larger batches still make more of the device, so a model that fills it
with one image is not asked for 32. Nothing that runs later is new to the device: where costs of an earlier
start still hold, a GPU runs every size once all the same. A CPU then runs two, since no size is new to it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from dd_core.noise import NoiseKey
from dd_core.plan import Plan
from server.devices.messages import Done, Failed, Forward, NewImage
from server.errors import ComputeError, DeviceKilledError
from server.scheduling.costs import CostTable, Work, WorkCosts
from server.scheduling.jobs import Stage, stages


class _Device(Protocol):
    async def run(self, command: Forward) -> Done | Failed: ...

    def drop(self, numbers: Sequence[int]) -> None: ...


# A pass longer than this is not tried with more images: others would wait for it too long.
_MAX_PASS_SECONDS = 1.0
_MIN_GAIN = 1.05
# So many sizes in a row that gain nothing end the search. They stay in use: under load a pass costs more
# besides, and the scheduler takes the smallest size that is good enough anyway.
_MAX_USELESS = 2
# Measurements of a size before it counts as gaining nothing.
_TRIES = 4
# Costs of an earlier start hold if a pass takes between 1 / so many and so many times as long.
_TOLERANCE = 1.5
# As many as VAR has; of raster plans the first ones stand for all.
_TEACHER_PASSES = 10


class LoadTimes(NamedTuple):
    """Seconds that a model took to load, and to warm up."""

    load: float
    warmup: float


class WarmupPass(NamedTuple):
    """A stage of a plan that stands for all stages of its work."""

    plan: Plan
    stage: Stage


def warmup_passes(model: str, plans: Sequence[Plan]) -> list[WarmupPass]:
    """Return the passes to measure of a model, cheap plans first."""
    found: list[WarmupPass] = []
    seen: set[Work] = set()
    for plan in sorted(plans, key=lambda plan: plan.cost):
        for stage in stages(model, plan):
            if stage.work not in seen:
                seen |= {stage.work, Work(model, "decode")}
                found.append(WarmupPass(plan, stage))
    return found


async def warm_up(
    passes: Sequence[WarmupPass],
    condition: int | str,
    costs: CostTable,
    device: _Device,
    numbers: Iterator[int],
    kept: MutableMapping[Work, WorkCosts],
    *,
    every_size: bool,
) -> None:
    """Measure `passes` on `device`, or check what is known of them, and record their costs in `costs`.

    Args:
        condition: any that the model takes.
        numbers: of the images, each once: models may be warmed up at the same time.
        kept: costs of an earlier start; afterwards those that held and those that were measured, but of no
            work that failed in some size, since that may be another program's doing.
        every_size: run also those sizes that a check can do without.

    Raises:
        ComputeError: a pass over a single image fails.
        DeviceKilledError: somebody ended the process in two such passes.
    """
    for plan, stage in passes:
        measurement = _Measurement(plan, stage, condition, costs, device, numbers)
        if await measurement.check(kept, every_size=every_size):
            continue
        complete = await measurement.run()
        for work in measurement.works:
            measured = costs.measured(work) if complete else None
            if measured is None:
                kept.pop(work, None)
            else:
                kept[work] = measured


@dataclass(frozen=True)
class _Measurement:
    """A kind of pass to measure in every size of batch; its images take their numbers from `numbers`."""

    plan: Plan
    stage: Stage
    condition: int | str
    costs: CostTable
    device: _Device
    numbers: Iterator[int]

    @property
    def works(self) -> tuple[Work, ...]:
        """Its work, and the decoding where its images are finished in the same pass."""
        work, last = self.stage.work, len(self.plan.segments) - 1
        decodes = not work.traits.stepwise and self.stage.segment == last
        return (work, Work(work.model, "decode")) if decodes else (work,)

    async def check(self, kept: Mapping[Work, WorkCosts], *, every_size: bool) -> bool:
        """Put kept costs into the table if they still hold, and return True; else leave nothing of them."""
        costs, work = self.costs, self.stage.work
        if not all(part in kept for part in self.works):
            return False
        for part in self.works:
            costs.restore(part, kept[part])
        largest = costs.largest(work)
        sizes = {costs.buckets[0], costs.best(work, largest)}
        for bucket in costs.buckets:
            if bucket > largest or not (every_size or bucket in sizes):
                continue
            if not await self._holds(bucket):
                for part in self.works:
                    costs.drop(part)
                return False
        return True

    async def _holds(self, bucket: int) -> bool:
        """Run a size until it takes no longer than it should: a disturbance can only make it slower."""
        expected = sum(self.costs.seconds(part, bucket) for part in self.works)
        for _ in range(_TRIES):
            answer = await self._run_batch(bucket)
            if isinstance(answer, Failed):
                return False
            if _seconds(answer) <= expected * _TOLERANCE:
                return _seconds(answer) >= expected / _TOLERANCE
        return False

    async def run(self) -> bool:
        """Measure; return False if a size failed, which bounds the batches from now on."""
        best, useless = 0.0, 0
        costs, work = self.costs, self.stage.work
        decode = Work(work.model, "decode")
        for bucket in costs.buckets:
            target = bucket / (best * _MIN_GAIN) - costs.gap if best else math.inf
            answer = await self._fastest(bucket, target)
            if isinstance(answer, Failed):
                if bucket == costs.buckets[0]:
                    if answer.killed:
                        raise DeviceKilledError.of(
                            "the device process was killed from outside during the warm-up, twice"
                        )
                    raise ComputeError(f"the warm-up of {self.plan.name} failed: {answer.reason}")
                costs.limit(work, bucket // 2)
                return False
            if work != decode:
                costs.observe(work, bucket, answer.seconds)
            if answer.decode_seconds:
                costs.observe(decode, bucket, answer.decode_seconds)
            took = _seconds(answer) + costs.gap
            useless = useless + 1 if bucket / took < best * _MIN_GAIN else 0
            if useless == _MAX_USELESS or took > _MAX_PASS_SECONDS:
                costs.limit(work, bucket)
                return True
            best = max(best, bucket / took)
        return True

    async def _fastest(self, bucket: int, target: float) -> Done | Failed:
        """Return the fastest of a few measurements, or the first that takes at most `target` seconds.

        A disturbance can only make a pass slower, and a size that seems to gain nothing would never be
        tried again: a server that was disturbed while it started would be half as fast for good.
        """
        found: Done | None = None
        for _ in range(_TRIES):
            answer = await self._run_batch(bucket)
            if isinstance(answer, Failed) and answer.killed:
                answer = await self._run_batch(bucket)  # a kernel that has no memory for it will kill again
            if isinstance(answer, Failed):
                return answer
            if found is None or _seconds(answer) < _seconds(found):
                found = answer
            if not target < _seconds(found) <= _MAX_PASS_SECONDS:
                break
        assert found is not None
        return found

    async def _run_batch(self, bucket: int) -> Done | Failed:
        """Run some passes over a batch; the seconds are the mean of a teacher's, else the second's."""
        work, segment = self.stage.work, self.stage.segment
        stepwise = work.traits.stepwise
        passes = min(self.stage.passes, _TEACHER_PASSES) if stepwise else 2
        numbers = tuple(itertools.islice(self.numbers, bucket))
        new = (NewImage(n, self.plan, self.condition, NoiseKey(0, i)) for i, n in enumerate(numbers))
        teacher_batch = numbers[0] if stepwise else None
        command = Forward(
            work.model, work.kind, numbers, (segment,) * bucket, bucket, tuple(new), teacher_batch
        )
        answers = []
        try:
            for turn in range(1, passes + 1):
                ends = turn == passes and len(self.works) > 1
                began = time.perf_counter()
                answer = await self.device.run(replace(command, finishing=numbers if ends else ()))
                if isinstance(answer, Failed):
                    return answer
                waited = time.perf_counter() - began - _seconds(answer) - answer.text_seconds
                self.costs.observe_gap(waited, _seconds(answer))
                answers.append(answer)
        finally:
            self.device.drop(numbers)
        mean = sum(answer.seconds for answer in answers) / passes
        return replace(answers[-1], seconds=mean) if stepwise else answers[-1]


def _seconds(answer: Done) -> float:
    return answer.seconds + answer.decode_seconds
