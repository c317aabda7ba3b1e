"""The pictures of a submitted job as they come, for a unary reply and a stream alike.

    DeviceWorker ─ deliver, complete, fail ─▶ Submission ─ async for ─▶ generation

A job may be split over several workers: their parts fill one submission. A reader that is behind finds all
that has come without waiting, so a batch of pictures wakes it once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from server.devices.messages import Pixels
from server.scheduling.jobs import Job


@dataclass(slots=True)
class Sampled:
    """A picture `[H, W, 3]` uint8 of image `index` of a job; a preview unless it is the `last` of it."""

    index: int
    pixels: Pixels
    last: bool


@dataclass(eq=False)
class Submission:
    """An async iterator of `Sampled`, for one reader.

    Each image comes once with `last`, and before that at most once as a preview, in any order. The times of
    the job (`compute_s`, `finished`) are up to date with every picture. The iteration ends once all images
    have come.

    Raises:
        ApiError: by the iteration, once the pictures that came before are read: the job failed or expired.
        asyncio.CancelledError: by the iteration, after `cancel`.
    """

    job: Job  # the whole job
    firsts: Mapping[Job, int]  # index of the first image by part; `{job: 0}` where it is whole
    abort: Callable[[], None]  # called if it ends before all parts are complete

    def __post_init__(self) -> None:
        self._incomplete = len(self.firsts)
        self._pictures: deque[Sampled] = deque()
        self._previewed: set[int] = set()
        self.over = False  # all pictures have come, or none will any more
        self._error: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sampled:
        while not self._pictures:
            if self.over:
                raise self._error or StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._pictures.popleft()

    def cancel(self) -> None:
        """Forget the job: images that have not begun are not computed. Harmless once it is over."""
        if not self.over:
            self._pictures.clear()
            self.fail(asyncio.CancelledError())

    def deliver(self, part: Job, index: int, pixels: Pixels, *, last: bool) -> None:
        """Add a picture of image `index` of a part; one that comes with a failure is still read before it."""
        self._take_times(part)
        index += self.firsts[part]
        if not last:
            if index in self._previewed:  # the device died and began the image again
                return
            self._previewed.add(index)
        self._pictures.append(Sampled(index, pixels, last))
        self._wake()

    def complete(self, part: Job) -> None:
        """Note that all pictures of a part have been delivered."""
        self._take_times(part)
        self._incomplete -= 1
        if not self._incomplete:
            self.over = True
            self._wake()

    def fail(self, error: BaseException) -> None:
        """End the iteration with an error, and the other parts with it; the first error counts."""
        if not self.over:
            self.over, self._error = True, error
            self.abort()
            self._wake()

    def _take_times(self, part: Job) -> None:
        """Set the times of the job to those of the part that was done last."""
        if part.finished >= self.job.finished:
            self.job.finished, self.job.compute_s = part.finished, part.compute_s

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
