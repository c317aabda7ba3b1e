"""Captions of a picture from its name, keywords and style, and which pictures are held out.

Two kinds are held out, both by a hash of their names, so that no order or version changes them:
whole *concepts* (the model never sees the thing in any style), and *pairs* of concept and style
(it has seen the thing, and the style, but never together). Figures are of held-out pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dd_core.errors import RecipeError, reason
from training.data.pictograms import Concept, Corpus

Split = Literal["train", "pair", "concept"]
PER_PICTURE = 8
# Which of a picture's captions names it in full: what it is asked for by in an evaluation.
FULL = 1
_CONCEPTS_HELD, _PAIRS_HELD = 0.04, 0.15


def captions_of(concept: Concept, style: str) -> tuple[str, ...]:
    """`PER_PICTURE` captions, half of them with the style; the same on every call.

    Two of a concept's keywords are chosen by its name and the style; a concept without any is called
    by its name alone.
    """
    name = concept.name.lower()
    words = [k.lower() for k in concept.keywords] or [name]
    first, second = (words[_number(f"{concept.code}/{k}") % len(words)] for k in ("first", "second"))
    styled = words[_number(f"{concept.code}/{style}") % len(words)]
    return (
        name,
        f"{name}, {style} style",
        f"{style} {name}",
        f"{name} in {style} style",
        f"{name} emoji",
        f"{first}, {second}" if first != second else first,
        f"{name}, {first}",
        f"{styled}, {name}, {style} style",
    )


def splits(corpus: Corpus) -> tuple[Split, ...]:
    """Which split each picture is in. Every concept that is not held out keeps a picture to learn from."""
    found: list[Split] = [split_of(c.code, s) for c, s in zip(corpus.concepts, corpus.styles, strict=True)]
    seen = {c.code for c, split in zip(corpus.concepts, found, strict=True) if split == "train"}
    for i, concept in enumerate(corpus.concepts):
        if found[i] == "pair" and concept.code not in seen:
            found[i] = "train"
            seen.add(concept.code)
    return tuple(found)


def split_of(code: str, style: str) -> Split:
    """The split that the hash of a concept, then that of the pair, gives."""
    if _share(code) < _CONCEPTS_HELD:
        return "concept"
    return "pair" if _share(f"{code}/{style}") < _PAIRS_HELD else "train"


@dataclass(frozen=True)
class Captions:
    """The different captions of some pictures, and which ones are each picture's.

    Args:
        texts: without repeats.
        of_picture: for each picture the `PER_PICTURE` places of its captions in `texts`.
    """

    texts: tuple[str, ...]
    of_picture: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, concepts: Sequence[Concept], styles: Sequence[str]) -> Captions:
        """Captions of pictures, given by concept and style."""
        place: dict[str, int] = {}
        rows = [
            tuple(place.setdefault(text, len(place)) for text in captions_of(concept, style))
            for concept, style in zip(concepts, styles, strict=True)
        ]
        return cls(tuple(place), tuple(rows))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; blank lines are passed over.

    Raises:
        RecipeError: no such file, or nothing in it.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {reason(error)}", param="prompts") from error
    if not any(lines):
        raise RecipeError(f"{path} holds no prompt", param="prompts")
    return [line for line in lines if line]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _share(text: str) -> float:
    return _number(text) / 2**64
