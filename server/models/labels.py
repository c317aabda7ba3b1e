"""Class names as people type them → class indices.

A class may have several names, joined by commas: "tench, Tinca tinca". The whole string names it, and
so does each part that no other class has. Two classes of ImageNet are called "crane": such a name is
refused, with the candidates.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.errors import BadRequestError, shortened

_LISTED = 20  # so many classes are listed in a refusal; of more, only near names
_LONGEST = 64  # characters of a name that near ones are looked for


@dataclass(frozen=True)
class LabelTable:
    """Names of classes in folded case, each with the indices that it stands for."""

    classes: tuple[str, ...]
    whole: dict[str, tuple[int, ...]]
    parts: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, classes: Sequence[str]) -> LabelTable:
        """Index names by the place that they have in `classes`."""
        names = list(enumerate(classes))
        parts = [(number, part) for number, name in names for part in name.split(",")]
        return cls(tuple(classes), _index(names), _index(parts))

    def find(self, label: int | str) -> int:
        """Return a class index from an index, or from a name in any case.

        Raises:
            BadRequestError: no such class, or several of this name; the message says which there are.
        """
        if isinstance(label, int):
            if 0 <= label < len(self.classes):
                return label
            raise BadRequestError(f"no class has this index; {self.choices()}", param="label")
        name = label.strip().casefold()
        # A name of which another class has a part still means the class that is called just so.
        found = self.whole.get(name) or self.parts.get(name) or ()
        if len(found) == 1:
            return found[0]
        shown = shortened(label)
        if found:
            several = ", ".join(f"{index} ({self.classes[index]})" for index in found)
            raise BadRequestError(
                f"{shown!r} is the name of {len(found)} classes, send an index: {several}", param="label"
            )
        raise BadRequestError(f"unknown class {shown!r}; {self.choices(label[:_LONGEST])}", param="label")

    def choices(self, near: str = "") -> str:
        """List what may be sent, for a refusal: all names of few classes, or the ones like `near`."""
        last = len(self.classes) - 1
        if len(self.classes) <= _LISTED:
            return f"classes are 0 to {last}: {', '.join(self.classes)}"
        close = difflib.get_close_matches(near.casefold(), list(self.parts), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        return f"classes are 0 to {last}, or their names (GET /models lists them){hint}"


def _index(names: Iterable[tuple[int, str]]) -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {}
    for number, name in names:
        key = name.strip().casefold()
        if key and number not in table.get(key, ()):
            table[key] = (*table.get(key, ()), number)
    return table
