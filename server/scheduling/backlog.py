"""Totals of the work ahead, and forecasts of when a request would be done: pure numbers.

Counts images by the work that they still have to go through, so that a forecast costs the same however
long the queue is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.scheduling.costs import CostTable, Lane, RemainingWork, Work

_Merged = dict[tuple[Lane, Work, int], int]


class Forecast(NamedTuple):
    """Seconds from now until a request would start, and until it would be done; and that it would
    take on a device with nothing else to do.
    """

    start: float
    finish: float
    alone: float


@dataclass(eq=False)
class Backlog:
    """Images that wait, by priority and by the work still ahead of them."""

    costs: CostTable
    light_share: float  # of the device, that light work gets while there is heavy work too

    def __post_init__(self) -> None:
        self._images: Counter[RemainingWork] = Counter()

    def add(self, remaining: Iterable[RemainingWork]) -> None:
        """Count the work that lies ahead of one more image, or of several."""
        for entry in remaining:
            self._images[entry] += 1

    def remove(self, remaining: Iterable[RemainingWork]) -> None:
        """Take back entries that `add` counted."""
        for entry in remaining:
            self._images[entry] -= 1
            if not self._images[entry]:
                del self._images[entry]

    def seconds(self, lane: Lane | None = None, priority: int | None = None) -> float:
        """Device time of all that waits: of a lane, of a priority or above."""
        return self._sum(self._merged(priority), lane)

    def _merged(self, priority: int | None) -> _Merged:
        """Images by their remaining work, of a priority or above: together they share passes."""
        merged: _Merged = {}
        for entry, count in self._images.items():
            if priority is None or entry.priority >= priority:
                key = entry[1:]
                merged[key] = merged.get(key, 0) + count
        return merged

    def _sum(self, merged: _Merged, lane: Lane | None) -> float:
        total = self.costs.total
        return sum(p * total(work, n) for (of, work, p), n in merged.items() if lane is None or of == lane)

    def forecast(self, remaining: Sequence[RemainingWork], count: int) -> Forecast:
        """Forecast a request that is admitted now, after all of its priority or above that is here.

        Args:
            remaining: work of each of its images, in the order of its stages; at least one entry.
            count: number of its images.
        """
        before = self._merged(remaining[0].priority)
        after, alone = dict(before), 0.0
        for entry in remaining:
            after[entry[1:]] = after.get(entry[1:], 0) + count
            # One image's passes follow each other: they may share batches with others', never with their own.
            alone += entry.passes * self.costs.total(entry.work, count)
        light, heavy = self._sum(before, "light"), self._sum(before, "heavy")
        light_after, heavy_after = self._sum(after, "light"), self._sum(after, "heavy")
        share = self.light_share if heavy else 1.0
        start, finish = light + heavy, light_after + heavy_after
        if heavy_after == heavy:
            start, finish = light / share, light_after / share
        elif remaining[0].lane == "light":
            start = light / share  # of what is heavy, all of it may go ahead of the rest
        return Forecast(start, max(finish, start + alone), alone)
