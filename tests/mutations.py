"""Every field of a JSON document, changed in every way that has ever hurt a reader of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

_NUMBERS = [0, -1, 1, 2, 3, 5, 31, 1000, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 2**64, -(2**64), 10**30]
_FLOATS = [0.5, -0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf")]
_TEXTS = [
    "", " ", "a", "A name", "\ud800", "x\udfff", "a\r\nb: c", "\0", "\x1b[31m", "..", "../../x",
    "日本語", "😀", "é" * 65, "x" * 4000, "y" * 20_000, "\u2028", "teacher", "student", "marginal",
]  # fmt: skip
_SHAPES: list[Any] = [None, True, False, [], {}, [[]], [None], {"": 0}, {"\ud800": 1}, [1] * 10_000]
VALUES: list[Any] = [*_NUMBERS, *_FLOATS, *_TEXTS, *_SHAPES]
GONE, TWICE = object(), object()
_FIRST = 2  # entries of a list or a large table that stand for all


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value, but the document itself."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        entries = list(document.items())
    elif isinstance(document, list):
        entries = list(enumerate(document[:_FIRST]))
    for key, value in entries:
        yield (*at, key)
        yield from places(value, (*at, key))


def changes(document: Any, skip: frozenset[str] = frozenset()) -> list[tuple[tuple[Any, ...], Any]]:
    """(place, what to put there), for every place and every value; `skip` names fields left alone."""
    found = [place for place in places(document) if place[0] not in skip]
    return [(place, value) for place in found for value in (GONE, TWICE, *VALUES)]


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of the document with another value at a place."""
    *parents, last = place
    copied = parent = copy.deepcopy(document)
    for key in parents:
        parent = parent[key]
    if value is GONE:
        del parent[last]
    elif value is TWICE and isinstance(parent, list):
        parent.append(parent[last])
    elif value is TWICE:
        parent[f"{last}\ud800"] = parent[last]
    else:
        parent[last] = value
    return copied
