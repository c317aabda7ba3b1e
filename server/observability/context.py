"""The context of a request: fields that only its route knows, for the log line and the span.

A route adds fields as they become known; the middleware that began the request reads them when it ends.
Names and values are few and bounded: no prompt, no label, no key.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

Fields = dict[str, str | int | float | bool]
# Paths that machines ask every few seconds: open without a key, not traced, their successes not logged.
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})


def context_of(scope: MutableMapping[str, Any]) -> Fields:
    """Return the fields of the request that `scope` belongs to; changes are seen by its log line."""
    fields: Fields = scope.setdefault("state", {}).setdefault("context", {})
    return fields
