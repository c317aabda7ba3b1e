"""Measured costs of forward passes on one device: pure numbers.

A pass is of a `Work`: one model and what it runs (its student, its decoder, one plan's teacher). The table
holds its cost for some sizes of batch, the buckets, which the warm-up measures; others follow from these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from dd_core.plan import ACTORS, Actor, Traits

Kind = Actor | Literal["decode"]
Lane = Literal["light", "heavy"]

# A larger batch must raise the throughput by at least this factor to be worth the wait that it brings.
_MIN_GAIN = 1.05
_DECODING = Traits()
_WEIGHT = 0.2  # of a new measurement in its moving average


class Work(NamedTuple):
    """The class of passes that cost the same: `plan` is a plan's name, or empty where any may mix."""

    model: str
    kind: Kind
    plan: str = ""

    @property
    def traits(self) -> Traits:
        """Traits of its actor; decoding has none."""
        return _DECODING if self.kind == "decode" else ACTORS[self.kind]


class WorkCosts(NamedTuple):
    """The measured costs of a work: seconds of a pass by bucket, and the most images of a batch."""

    seconds: dict[int, float]
    largest: int


class RemainingWork(NamedTuple):
    """`passes` of `work` that an image still has to go through, counted for `lane`."""

    priority: int
    lane: Lane
    work: Work
    passes: int


def lane_of(work: Work) -> Lane:
    """Return the lane of a pass. Stepwise actors are heavy: many passes an image, and a batch to decode."""
    return "heavy" if work.kind == "decode" or work.traits.stepwise else "light"


def buckets_up_to(limit: int) -> tuple[int, ...]:
    """Powers of two below `limit`, and `limit`."""
    sizes = [1]
    while sizes[-1] * 2 < limit:
        sizes.append(sizes[-1] * 2)
    return tuple(dict.fromkeys([*sizes, limit]))


class CostTable:
    """Moving averages of the seconds of a pass, by work and bucket.

    Args:
        buckets: ascending batch sizes.
    """

    def __init__(self, buckets: Sequence[int]) -> None:
        self.buckets = tuple(buckets)
        self.gap = 0.0  # seconds that the device waits from one pass to the next
        self._seconds: dict[Work, dict[int, float]] = {}
        self._limit: dict[Work, int] = {}
        # Asked several times for every request, and changed by a pass alone.
        self._totals: dict[tuple[Work, int], float] = {}

    def observe(self, work: Work, bucket: int, seconds: float) -> None:
        """Record the measured seconds of a pass."""
        known = self._seconds.setdefault(work, {})
        old = known.get(bucket)
        known[bucket] = seconds if old is None else old + _WEIGHT * (seconds - old)
        self._totals.clear()

    def observe_gap(self, seconds: float, most: float = math.inf) -> None:
        """Record the time from one pass to the next while work waits: messages, and the server's own work.
        It is the same for a pass of one image and of many.

        Args:
            most: seconds of the pass itself; a longer gap, as of a machine that stopped, counts as this.
        """
        seconds = min(max(0.0, seconds), most)
        self.gap += _WEIGHT * (seconds - self.gap)
        self._totals.clear()

    def limit(self, work: Work, largest: int) -> None:
        """Bound batches of `work` to `largest` images from now on: more did not fit, or gain nothing."""
        fitting = [b for b in self.buckets if b <= max(largest, self.buckets[0])]
        self._limit[work] = min(fitting[-1], self.largest(work))
        self._totals.clear()

    def largest(self, work: Work) -> int:
        """Return the most images of a batch of `work`."""
        return self._limit.get(work, self.buckets[-1])

    def measured(self, work: Work) -> WorkCosts | None:
        """Return the costs of a work as they are now; None if it never ran."""
        known = self._seconds.get(work)
        return None if known is None else WorkCosts(dict(known), self.largest(work))

    def restore(self, work: Work, costs: WorkCosts) -> None:
        """Put the costs of a work in the place of what is known of it."""
        self._seconds[work], self._limit[work] = dict(costs.seconds), costs.largest
        self._totals.clear()

    def drop(self, work: Work) -> None:
        """Drop all measurements of a work."""
        self._seconds.pop(work, None)
        self._limit.pop(work, None)
        self._totals.clear()

    def forget(self, model: str) -> None:
        """Drop all measurements of a model that was unloaded."""
        for work in [w for w in {**self._seconds, **self._limit} if w.model == model]:
            self.drop(work)

    def seconds(self, work: Work, bucket: int) -> float:
        """Return the expected seconds of one pass; of a bucket that never ran, in proportion to the nearest
        below (or as much as the nearest above); 0 while nothing is known.
        """
        known = self._seconds.get(work)
        if not known:
            return 0.0
        if bucket in known:
            return known[bucket]
        below = [b for b in known if b < bucket]
        return known[max(below)] * bucket / max(below) if below else known[min(known)]

    def total(self, work: Work, images: int) -> float:
        """Return the expected seconds of one pass over `images`, in batches of the best throughput."""
        found = self._totals.get((work, images))
        if found is None:
            best = self.best(work, images)
            whole, rest = divmod(images, best)
            found = whole * self.seconds(work, best)
            found += self.seconds(work, self.bucket_for(rest)) if rest else 0.0
            self._totals[work, images] = found
        return found

    def bucket_for(self, images: int) -> int:
        """The smallest bucket that holds `images`, or the largest of all."""
        return next((b for b in self.buckets if b >= images), self.buckets[-1])

    def best(self, work: Work, waiting: int, followed_by: Work | None = None) -> int:
        """Return the bucket of the highest throughput (images per second) for `waiting` images.

        Either a bucket that they fill, or the next one with some rows idle; of those that are about as
        good, the smallest. A bucket that never ran counts as no dearer than the one below it, so it is
        tried.

        Args:
            followed_by: work that the same images go through in the same pass after it.
        """
        most = min(self.bucket_for(waiting), self.largest(work))
        known, cost, rates = self._seconds.get(work, {}), 0.0, {}
        for bucket in (b for b in self.buckets if b <= most):
            cost, images = known.get(bucket, cost), min(bucket, waiting)
            size = self.bucket_for(images)
            each = 0.0 if followed_by is None else self.seconds(followed_by, size) / size
            rates[bucket] = images / (cost + self.gap + images * each + 1e-9)
        top = max(rates.values())
        return next(b for b, rate in rates.items() if rate * _MIN_GAIN >= top)
