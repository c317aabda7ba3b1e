"""Retries: on 429, on 503, and where no reply came.

    attempt ─▶ refused ─▶ wait max(Retry-After, back-off) ─▶ attempt …     within `timeout` and `deadline_ms`

Generating images changes no state on the server, so an attempt whose reply was lost may be repeated. Where
the wait would not end in time the error is raised at once, with the server's `retry_after`.
"""

from __future__ import annotations

from math import inf
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


class Attempts:
    """The attempts of one call, which starts when this is constructed.

    Args:
        timeout: seconds for all attempts together.
        retries: most attempts after the first, of calls that are retried.
    """

    def __init__(self, call: Call[Any], timeout: float, retries: int) -> None:
        self._call, self._timeout = call, timeout
        self._retries = retries if call.retried else 0
        self._stop = monotonic() + timeout
        self._deadline = monotonic() + call.deadline
        self._failed = 0

    def request(self) -> dict[str, Any]:
        """Return the arguments of `build_request` for the next attempt.

        A retry sends what is left of the caller's `deadline_ms`, since the server counts it from arrival.
        """
        left, remaining = (max(_LEAST, end - monotonic()) for end in (self._stop, self._deadline))
        body = self._call.body
        if self._failed and remaining < inf:
            body = {**(body or {}), "deadline_ms": 1e3 * remaining}
        return {
            "method": self._call.method,
            "url": self._call.path,
            "headers": {"accept": self._call.accept},
            "json": body,
            "timeout": httpx2.Timeout(left, connect=min(left, CONNECT)),
        }

    def begun(self, response: httpx2.Response) -> httpx2.Response:
        """Return a reply that is a success; a stream may take the whole `timeout` again between two events,
        however little of it the attempts have left.
        """
        if self._call.streams:
            response.request.extensions["timeout"]["read"] = self._timeout
        return response

    def wait_after(self, error: DDClientError) -> float:
        """Return the seconds to wait before the next attempt: exponential back-off, at least `retry_after`;
        random, so that refused clients spread out.

        Raises:
            DDClientError: `error` itself, where no further attempt is due.
        """
        backoff = min(LONGEST_WAIT, FIRST_WAIT * 2.0**self._failed) * (0.5 + 0.5 * random())
        pause = max(backoff, (error.retry_after or 0.0) * (1 + 0.1 * random()))
        left = min(self._stop, self._deadline) - monotonic()
        unanswered = isinstance(error, ConnectionFailedError) and not isinstance(error, TimedOutError)
        transient = unanswered or isinstance(error, OverloadedError)
        if not transient or self._failed >= self._retries or pause >= left:
            raise error
        self._failed += 1
        return pause
