"""Jobs with a deadline, in the order in which they are to be looked at."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

# Jobs that are over and still here, besides as many as lived when they were last counted.
_MAX_STALE = 100


class _Timed(Protocol):
    """A job."""

    over: bool
    deadline: float | None  # not None of one that is here

    @property
    def begun(self) -> bool: ...


JobT = TypeVar("JobT", bound=_Timed)


@dataclass(eq=False)
class Deadlines(Generic[JobT]):
    """A heap of jobs by the time of their next check. Those that are over leave it by themselves."""

    def __post_init__(self) -> None:
        self._heap: list[tuple[float, int, JobT]] = []
        self._most = _MAX_STALE
        self._numbers = itertools.count()

    def check_at(self, job: JobT, when: float) -> None:
        """Look at a job at a time."""
        heapq.heappush(self._heap, (when, next(self._numbers), job))
        if len(self._heap) > self._most:  # one far off would keep all behind it
            self._heap = [entry for entry in self._heap if not entry[2].over]
            heapq.heapify(self._heap)
            self._most = 2 * len(self._heap) + _MAX_STALE

    def expired(self, now: float) -> list[JobT]:
        """Return the jobs to give up: their deadline has passed, or they have not begun and could not be
        done before it. Each is returned once. A job that is late anyway must not make others late.
        """
        found = []
        while self._heap and (self._heap[0][2].over or self._heap[0][0] <= now):
            job = heapq.heappop(self._heap)[2]
            if job.over:
                continue
            assert job.deadline is not None
            if now < job.deadline and job.begun:
                self.check_at(job, job.deadline)
            else:
                found.append(job)
        return found

    @property
    def next(self) -> float | None:
        """Time of the next call of `expired`, or None."""
        return self._heap[0][0] if self._heap else None

    def __len__(self) -> int:
        return len(self._heap)
