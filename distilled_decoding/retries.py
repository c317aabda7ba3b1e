"""When a call is made again: on 429, 503, and where no reply came at all.

    attempt ─▶ refused ─▶ wait max(Retry-After, back-off) ─▶ attempt …     within `timeout` and `deadline_ms`

Making images changes nothing on the server, so an attempt whose reply was lost may be repeated. A wait
that does not fit is not begun: the refusal is raised at once, and its `retry_after` says when to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import random
from time import monotonic
from typing import Any

import httpx2

from distilled_decoding.calls import Call
from distilled_decoding.errors import ConnectionFailedError, DDClientError, OverloadedError, TimedOutError

FIRST_WAIT = 0.25  # seconds; doubled each time
LONGEST_WAIT = 8.0
CONNECT = 5.0  # seconds: a host that is gone should be tried again while there is time
_LEAST = 1e-3


@dataclass(frozen=True)
class Limits:
    """`timeout` in seconds for a call with all its attempts, and how often it is repeated."""

    timeout: float
    retries: int


class Attempts:
    """The attempts of one call, which begins now."""

    def __init__(self, call: Call[Any], limits: Limits) -> None:
        self._call = call
        self._limits = limits
        self._began = monotonic()
        self._failed = 0

    def request(self) -> dict[str, Any]:
        """What to build the next request of.

        A repeated request has what is left of the caller's `deadline_ms`: the server counts from arrival.
        """
        left, body = max(_LEAST, self._left()), self._call.body
        if self._call.deadline is not None and self._failed:
            remaining = max(_LEAST, self._call.deadline - self._elapsed())
            body = {**(body or {}), "deadline_ms": 1e3 * remaining}
        return {
            "method": self._call.method,
            "url": self._call.path,
            "headers": {"accept": self._call.accept},
            "json": body,
            "timeout": httpx2.Timeout(left, connect=min(left, CONNECT)),
        }

    def wait_after(self, error: DDClientError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            DDClientError: `error`, where there is to be none.
        """
        pause = self._pause(error.retry_after)
        left = self._left()
        if self._call.deadline is not None:
            left = min(left, self._call.deadline - self._elapsed())
        if not _passes(error) or self._failed >= self._limits.retries or pause >= left:
            raise error
        self._failed += 1
        return pause

    def _elapsed(self) -> float:
        return monotonic() - self._began

    def _left(self) -> float:
        return self._limits.timeout - self._elapsed()

    def _pause(self, retry_after: float | None) -> float:
        """Spread at random, so that clients that were refused together do not come back together."""
        backoff = min(LONGEST_WAIT, FIRST_WAIT * 2.0**self._failed) * (0.5 + 0.5 * random())
        return max(backoff, (retry_after or 0.0) * (1 + 0.1 * random()))


def _passes(error: DDClientError) -> bool:
    """Whether the same request may succeed later."""
    unanswered = isinstance(error, ConnectionFailedError) and not isinstance(error, TimedOutError)
    return unanswered or isinstance(error, OverloadedError)
