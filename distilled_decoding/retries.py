"""Retries: on 429, on 503, and where no reply came.

    attempt ─▶ refused ─▶ wait max(Retry-After, back-off) ─▶ attempt …     within `timeout` and `deadline_ms`

Generating images changes no state on the server, so an attempt whose reply was lost may be repeated. Where
the wait would not end in time the error is raised at once, with the server's `retry_after`.
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
CONNECT = 5.0  # seconds: short, so that time is left to retry a host that does not answer
_LEAST = 1e-3


@dataclass(frozen=True)
class Limits:
    """Bounds of a call: `timeout` in seconds for all attempts together, and the number of retries."""

    timeout: float
    retries: int


class Attempts:
    """The attempts of one call, which starts when this is constructed."""

    def __init__(self, call: Call[Any], limits: Limits) -> None:
        self._call = call
        self._limits = limits
        self._began = monotonic()
        self._failed = 0

    def request(self) -> dict[str, Any]:
        """Return the arguments of `build_request` for the next attempt.

        A retry sends what is left of the caller's `deadline_ms`, since the server counts it from arrival.
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
        """Return the seconds to wait before the next attempt.

        Raises:
            DDClientError: `error` itself, where no further attempt is due.
        """
        pause = self._pause(error.retry_after)
        left = self._left()
        if self._call.deadline is not None:
            left = min(left, self._call.deadline - self._elapsed())
        if not _is_transient(error) or self._failed >= self._limits.retries or pause >= left:
            raise error
        self._failed += 1
        return pause

    def _elapsed(self) -> float:
        return monotonic() - self._began

    def _left(self) -> float:
        return self._limits.timeout - self._elapsed()

    def _pause(self, retry_after: float | None) -> float:
        """Exponential back-off, at least `retry_after`; random, so that refused clients spread out."""
        backoff = min(LONGEST_WAIT, FIRST_WAIT * 2.0**self._failed) * (0.5 + 0.5 * random())
        return max(backoff, (retry_after or 0.0) * (1 + 0.1 * random()))


def _is_transient(error: DDClientError) -> bool:
    """True where the same request may succeed later."""
    unanswered = isinstance(error, ConnectionFailedError) and not isinstance(error, TimedOutError)
    return unanswered or isinstance(error, OverloadedError)
