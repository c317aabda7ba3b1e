"""The passes that a device was sent and has not answered: the one that it is at, and perhaps the next.

A GPU is sent its next pass when the one that it is at is about to end: so it need not wait for an answer to
be read, a batch to be formed and a command to arrive. It is not sent earlier, so that what arrives meanwhile
is in that batch; nor when the first is late or was never measured, since then nobody knows when it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from server.devices.messages import Done, Failed
from server.scheduling.jobs import Batch

# Of the answer to a pass of the warm-up.
Reply = asyncio.Future[Done | Failed]
Source = Batch | Reply
# A pass is sent so many seconds before the end of the one before it, or half of that one's time before. An
# answer, a batch and a command take less, with timers that are exact to a thousandth.
LEAD = 0.002


@dataclass(eq=False)
class _Pass:
    """`began`: when the device came to it; of one that waits, when it was sent."""

    began: float
    expected: float
    source: Source

    @property
    def left(self) -> float:
        """Seconds until it is done, as expected; below 0 if it is late."""
        return self.began + self.expected - time.perf_counter()


@dataclass(eq=False)
class InFlight:
    """At most two passes, answered in the order in which they were sent."""

    ahead: bool  # the device is sent its next pass before it has answered

    def __post_init__(self) -> None:
        self._passes: deque[_Pass] = deque()

    def __len__(self) -> int:
        return len(self._passes)

    @property
    def left(self) -> float:
        """Seconds until the pass that the device is at is done, as expected; 0 if there is none."""
        return max(0.0, self._passes[0].left) if self._passes else 0.0

    @property
    def until_next(self) -> float | None:
        """Seconds until the device wants its next pass; None if only an answer will tell. A pass of the
        warm-up is measured, and has the device to itself.
        """
        if not self._passes:
            return 0.0
        first = self._passes[0]
        if not self.ahead or len(self._passes) > 1 or isinstance(first.source, asyncio.Future):
            return None
        lead = min(LEAD, first.expected / 2)
        return None if first.left < -lead or not lead else max(0.0, first.left - lead)

    def add(self, expected: float, source: Source) -> None:
        """Note a pass that is sent, and the seconds that it should take."""
        self._passes.append(_Pass(time.perf_counter(), expected, source))

    def end(self) -> tuple[Source, float]:
        """Take out the pass that the device was at, with the seconds that it took."""
        assert self._passes, "an answer without a question"
        ended, now = self._passes.popleft(), time.perf_counter()
        if self._passes:
            self._passes[0].began = now
        return ended.source, now - ended.began

    def clear(self) -> None:
        """Forget all: the process is gone."""
        self._passes.clear()
