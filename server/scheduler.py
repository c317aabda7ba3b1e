"""Which waiting images are computed together: pure logic, without torch, threads or clocks.

    offer(job) → queue of jobs, bounded in images → take() → Batch → finish(batch) → job is complete

A batch holds images of one (model, plan), the one that the longest-waiting job asks for, in order
of arrival and across requests. A large job is cut at the batch limit and keeps its place, so no
plan can starve another. Times are seconds on whatever monotonic clock the caller reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dd_core.plan import Plan

# (model name, plan): what has to agree for two images to be computed in one call.
BatchKey = tuple[str, Plan]


@dataclass(eq=False)
class Job:
    """The images of one request.

    Args:
        key: model and plan.
        label: class index.
        seed: image i is drawn from (seed, i).
        count: number of images.
        submitted: when it was offered.
    """

    key: BatchKey
    label: int
    seed: int
    count: int
    submitted: float
    canceled: bool = False
    taken: int = 0
    done: int = 0
    compute_s: float = 0.0
    finished: float = 0.0

    @property
    def queue_s(self) -> float:
        """Seconds that it waited, also between its batches if it was cut into several."""
        return max(0.0, self.finished - self.submitted - self.compute_s)


@dataclass(frozen=True)
class Batch:
    """Images for one call: `(job, image index)` pairs that share `key`."""

    key: BatchKey
    items: list[tuple[Job, int]] = field(default_factory=list)

    @property
    def jobs(self) -> list[Job]:
        """The jobs that take part, each once, in order of arrival."""
        return list(dict.fromkeys(job for job, _ in self.items))


class WorkMeter:
    """Measured seconds per image of every key, as a moving average."""

    def __init__(self, weight: float = 0.3) -> None:
        self._weight = weight
        self._per_image: dict[BatchKey, float] = {}

    def observe(self, key: BatchKey, images: int, seconds: float) -> None:
        """Account for a batch of `images` that took `seconds`."""
        rate, old = seconds / images, self._per_image.get(key)
        self._per_image[key] = rate if old is None else old + self._weight * (rate - old)

    def estimate(self, key: BatchKey, images: int) -> float:
        """Seconds that `images` of `key` take; for a key that never ran, scaled by the passes of
        the dearest one that did.
        """
        rate = self._per_image.get(key)
        if rate is None:
            known = [(k[1].cost, r) for k, r in self._per_image.items()]
            cost, base = max(known, default=(1, 0.0))
            rate = base * key[1].cost / cost
        return rate * images


class Scheduler:
    """The queue. Not thread-safe: its owner (`server.worker`) holds a lock.

    Args:
        max_batch: most images of a batch.
        queue_size: most images that wait.
    """

    def __init__(self, max_batch: int, queue_size: int) -> None:
        self.max_batch = max_batch
        self.queue_size = queue_size
        self.meter = WorkMeter()
        self._jobs: dict[Job, None] = {}  # an ordered set: order of arrival
        self._depth = 0

    @property
    def depth(self) -> int:
        """Images that wait."""
        return self._depth

    def offer(self, job: Job) -> bool:
        """Admit a job at once, or refuse it because its images find no room."""
        if self._depth + job.count > self.queue_size:
            return False
        self._jobs[job] = None
        self._depth += job.count
        return True

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: its images that have not started never will."""
        job.canceled = True
        if job in self._jobs:
            del self._jobs[job]
            self._depth -= job.count - job.taken

    def take(self) -> Batch | None:
        """The next batch, or None when nothing waits."""
        if not self._jobs:
            return None
        batch = Batch(next(iter(self._jobs)).key)
        for job in list(self._jobs):
            if job.key != batch.key:
                continue
            room = self.max_batch - len(batch.items)
            stop = min(job.count, job.taken + room)
            batch.items.extend((job, index) for index in range(job.taken, stop))
            job.taken = stop
            if job.taken == job.count:
                del self._jobs[job]
            if len(batch.items) == self.max_batch:
                break
        self._depth -= len(batch.items)
        return batch

    def finish(self, batch: Batch, seconds: float, now: float) -> list[Job]:
        """Account for a computed batch; returns the jobs that are complete now."""
        self.meter.observe(batch.key, len(batch.items), seconds)
        for job, _ in batch.items:
            job.done += 1
        complete = []
        for job in batch.jobs:
            job.compute_s += seconds
            if job.done == job.count and not job.canceled:
                job.finished = now
                complete.append(job)
        return complete

    def drain(self) -> list[Job]:
        """Empty the queue; returns the jobs that were in it."""
        jobs = list(self._jobs)
        self._jobs.clear()
        self._depth = 0
        return jobs

    def retry_after(self, count: int, busy: float = 0.0) -> int:
        """Whole seconds until `count` more images should find room, at least 1.

        From measured work: `busy` is what is left of the running batch, and as many images as are
        in the way have to be computed after it.
        """
        excess, seconds = self._depth + count - self.queue_size, max(0.0, busy)
        for job in self._jobs:
            if excess <= 0:
                break
            images = min(job.count - job.taken, excess)
            seconds += self.meter.estimate(job.key, images)
            excess -= images
        return max(1, math.ceil(seconds))
