"""How much work lies ahead, and when a request would be done: pure numbers.

Counts images by what they still have to go through, so that a prediction costs the same however long
the queue is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from server.scheduling.costs import CostTable, Work
from server.scheduling.jobs import Job, Sample, Stage

Lane = Literal["light", "heavy"]


def lane_of(work: Work) -> Lane:
    """Teachers are heavy: many passes an image, and a cohort to decode. All else is light."""
    return "heavy" if work.kind in ("teacher", "decode") else "light"


class _Ahead(NamedTuple):
    priority: int
    lane: Lane
    work: Work
    passes: int


_Merged = dict[tuple[Lane, Work, int], int]


class Forecast(NamedTuple):
    """Seconds from now until a request would start, and until it would be done; and that it would
    take on a device with nothing else to do.
    """

    start: float
    finish: float
    alone: float


class Backlog:
    """Images that wait, by priority and by the work still ahead of them.

    Args:
        costs: what passes take.
        light_share: share of the device that light work gets while there is heavy work too.
    """

    def __init__(self, costs: CostTable, light_share: float) -> None:
        self._costs = costs
        self._light_share = light_share
        self._images: Counter[_Ahead] = Counter()

    def add(self, samples: Iterable[Sample]) -> None:
        """Count what is ahead of them."""
        self._count(samples, 1)

    def remove(self, samples: Iterable[Sample]) -> None:
        """Take back what `add` counted; they must be where they were then."""
        self._count(samples, -1)

    def _count(self, samples: Iterable[Sample], sign: int) -> None:
        for sample in samples:
            for ahead in _ahead(sample.job, sample.job.stages[sample.stage :]):
                self._images[ahead] += sign
                if not self._images[ahead]:
                    del self._images[ahead]

    def seconds(self, lane: Lane | None = None, priority: int | None = None) -> float:
        """Device time of all that waits: of a lane, of a priority or above."""
        return self._sum(self._merged(priority), lane)

    def _merged(self, priority: int | None) -> _Merged:
        """Images by what they have ahead, of a priority or above: together they share passes."""
        merged: _Merged = {}
        for ahead, count in self._images.items():
            if priority is None or ahead.priority >= priority:
                key = ahead[1:]
                merged[key] = merged.get(key, 0) + count
        return merged

    def _sum(self, merged: _Merged, lane: Lane | None) -> float:
        total = self._costs.total
        return sum(p * total(work, n) for (of, work, p), n in merged.items() if lane is None or of == lane)

    def forecast(self, job: Job, *, in_order: bool) -> Forecast:
        """When `job` would start and be done, after all of its priority or above that is here.

        Args:
            in_order: nothing overtakes anything; else light work gets its share of the device.
        """
        before = self._merged(job.priority)
        after, alone = dict(before), 0.0
        for ahead in _ahead(job, job.stages):
            after[ahead[1:]] = after.get(ahead[1:], 0) + job.count
            # One image's passes follow each other: they may share batches with others', never with their own.
            alone += ahead.passes * self._costs.total(ahead.work, job.count)
        light, heavy = self._sum(before, "light"), self._sum(before, "heavy")
        light_after, heavy_after = self._sum(after, "light"), self._sum(after, "heavy")
        share = self._light_share if heavy else 1.0
        start, finish = light + heavy, light_after + heavy_after
        if not in_order and heavy_after == heavy:
            start, finish = light / share, light_after / share
        elif not in_order and lane_of(job.stages[0].work) == "light":
            start = light / share  # of what is heavy, all of it may go ahead of the rest
        return Forecast(start, max(finish, start + alone), alone)


def _ahead(job: Job, left: Iterable[Stage]) -> list[_Ahead]:
    """What one image of `job` has still to go through."""
    found = [_Ahead(job.priority, lane_of(s.work), s.work, s.passes) for s in left]
    if not found:
        return found
    decode, last = Work(job.model, "decode"), found[-1]
    shown = [a for a in found[:-1] if job.previews and a.work.kind == "student"]
    if last.work.kind != "decode":  # it comes with the last pass
        shown.append(last)
    return found + [_Ahead(job.priority, a.lane, decode, 1) for a in shown]
