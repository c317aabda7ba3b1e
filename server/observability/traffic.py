"""Counts of HTTP replies by route, method and status: whoever answered, and where nobody could.

A path is counted as the template of its route, since its own text comes from the client.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from prometheus_client import Counter
from starlette.routing import Mount, Route

# Label of what is not known: the route of a path that does not exist or of a head that never ended; the
# model and plan of a request that was refused before they were.
UNKNOWN = "none"
# The customary status of a request whose client left; it was never sent.
CLIENT_LEFT = 499
_OTHER = "other"
_METHODS = frozenset({UNKNOWN, "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Of what no route sees: not HTTP, too slow, a head too long, a connection too many.
_REFUSED = (400, 408, 431, 503)


class Traffic:
    """The counter `replies` by route, method and code (`CLIENT_LEFT`: the client left before a reply)."""

    def __init__(self, replies: Counter) -> None:
        self._exact: dict[str, str] = {}
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        # A call of `labels` costs as much as the count.
        self._child = lru_cache(maxsize=None)(replies.labels)
        for code in _REFUSED:
            self._child(UNKNOWN, UNKNOWN, code)
        self._child(UNKNOWN, "GET", 404)

    def bind(self, routes: Iterable[Route | Mount], codes: Iterable[int] = ()) -> None:
        """Take the routes of an application, and make the series that they can come to.

        Args:
            codes: statuses that any route may have, besides those that it documents.
        """
        for route in routes:
            if route.path_regex.groups:
                self._patterns.append((route.path_regex, route.path_format))
            else:
                self._exact[route.path_format] = route.path_format
            documented = getattr(route, "responses", {})
            success = getattr(route, "status_code", None) or 200
            for method in getattr(route, "methods", None) or {"GET"}:
                for code in {success, *map(int, documented), *codes, CLIENT_LEFT}:
                    self._child(route.path_format, method, code)

    def template(self, path: str) -> str:
        """The template of the route that `path` belongs to, or `UNKNOWN`."""
        known = self._exact.get(path)
        if known is not None:
            return known
        return next((template for regex, template in self._patterns if regex.match(path)), UNKNOWN)

    def count(self, method: str, path: str, code: int) -> None:
        """Count one reply."""
        method = method if method in _METHODS else _OTHER
        self._child(self.template(path), method, code).inc()
