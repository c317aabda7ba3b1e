"""What only a route knows about a request, for the log line and the span.

A route notes facts as they become known; the middleware that began the request reads them when it
ends. Names and values are few and bounded: no prompt, no label, no key.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.requests import HTTPConnection

Fact = str | int | float | bool


def context_of(scope: MutableMapping[str, Any]) -> dict[str, Fact]:
    """The facts of the request that `scope` belongs to."""
    facts: dict[str, Fact] = scope.setdefault("state", {}).setdefault("facts", {})
    return facts


def bind(request: HTTPConnection, **facts: Fact) -> None:
    """Add to a request's facts: `bind(request, model="cifar10", plan="dd-1")`."""
    context_of(request.scope).update(facts)
