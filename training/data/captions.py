"""Captions of a picture from its name, keywords, style and colour, and which pictures are held out.

Two kinds are held out, both by a hash of their names, so that no order or version changes them:
whole *concepts* (the model never sees the thing in any style), and *pairs* of concept and style
(it has seen the thing, and the style, but never together). Styles that are one drawing in several
finishes are held out together. Figures are of held-out pairs.
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
# Fluent's 3D and modern pictures differ by 2 % of a pixel's range, its flat ones by 5, other styles by 15.
_DRAWING = {"glossy": "3d", "flat": "3d"}
_COLOURS = {"red", "orange", "brown", "yellow", "green", "blue", "purple", "pink"}
_COLOURS |= {"white", "black", "grey", "gold", "silver"}


def captions_of(concept: Concept, style: str, colour: str = "") -> tuple[str, ...]:
    """`PER_PICTURE` captions, half of them with the style; the same on every call.

    Two of a concept's keywords are chosen by its name and the style. The name is in every caption: a
    keyword alone ("food", "off") may mean anything.

    Args:
        colour: the word for the picture's main colour (`training.data.colours`), if it has one.
    """
    name = called(concept)
    coloured = name if not colour or _COLOURS & set(name.split()) else f"{colour} {name}"
    words = [k.lower() for k in concept.keywords if k.isalpha() and len(k) > 2 and k.lower() not in name]
    picks = (f"{concept.code}/{style}{k}" for k in ("", "/second"))
    first, second = (words[_number(pick) % len(words)] if words else "" for pick in picks)
    return (
        name,
        f"{name}, {style} style",
        f"{style} {name}",
        coloured,
        f"{coloured} in {style} style",
        f"{_article(name, coloured)}{coloured}",
        f"{name}, {first}" if first else name,
        f"{second}, {name}, {style} style" if second else f"{style} style {name}",
    )


def called(concept: Concept) -> str:
    """A concept's name in the order of speech: "woman: bald" is a bald woman."""
    kind, _, part = concept.name.lower().partition(": ")
    if not part:
        return kind
    if part == "bald":
        return f"bald {kind}"
    return f"{kind} with {part}" if part.endswith(("hair", "beard")) else f"{kind}, {part}"


def _article(name: str, spoken: str) -> str:
    """The article that `spoken` begins with and a blank, or nothing where the name is of several things."""
    thing = name.partition(" with ")[0].partition(",")[0]
    plural = thing.endswith("s") and not thing.endswith(("ss", "us", "is"))
    if plural or thing.split()[0] in ("men", "women", "people"):
        return ""
    return "an " if spoken[0] in "aeiou" and not spoken.startswith(("uni", "ute", "eu")) else "a "


def splits(corpus: Corpus) -> tuple[Split, ...]:
    """Which split each picture is in. Every concept that is not held out keeps a drawing to learn from."""
    drawings = [(c.code, _DRAWING.get(s, s)) for c, s in zip(corpus.concepts, corpus.styles, strict=True)]
    found = [split_of(*drawing) for drawing in drawings]
    seen = {code for (code, _), split in zip(drawings, found, strict=True) if split == "train"}
    kept = {code: drawing for code, drawing in reversed(drawings) if code not in seen}  # the first one
    return tuple(
        "train" if split == "pair" and kept.get(code) == drawing else split
        for (code, drawing), split in zip(drawings, found, strict=True)
    )


def split_of(code: str, drawing: str) -> Split:
    """The split that the hash of a concept, then that of the pair, gives."""
    if _share(code) < _CONCEPTS_HELD:
        return "concept"
    return "pair" if _share(f"{code}/{drawing}") < _PAIRS_HELD else "train"


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
    def of(cls, concepts: Sequence[Concept], styles: Sequence[str], colours: Sequence[str]) -> Captions:
        """Captions of pictures, given by concept, style and the word for the main colour."""
        place: dict[str, int] = {}
        rows = [
            tuple(place.setdefault(text, len(place)) for text in captions_of(*picture))
            for picture in zip(concepts, styles, colours, strict=True)
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
