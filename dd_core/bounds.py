"""Bounds of what a manifest may say: every real model lies well within, and none costs much to refuse.

Sizes that pass are held against the files (`dd_core.bundle`) before anything is allocated.
"""

from __future__ import annotations

from typing import Annotated
from unicodedata import category

from pydantic import AfterValidator, Field

MAX_TOKENS = 8192  # of an image; masks have its square
MAX_SIDE = 64  # of a grid of tokens

Depth = Annotated[int, Field(ge=1, le=256)]  # layers, heads
Width = Annotated[int, Field(ge=1, le=16_384)]  # dimensions, channels
Codes = Annotated[int, Field(ge=1, le=2**20)]  # rows of a table: of codes, classes, word pieces
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]  # of a grid of tokens
Sides = Annotated[tuple[Side, ...], Field(min_length=1, max_length=32)]
# Each but the first halves the picture.
Multipliers = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=7)]
Positions = Annotated[int, Field(ge=1, le=1024)]  # of a text
Step = Annotated[int, Field(ge=0, le=MAX_TOKENS)]  # a block index
Epsilon = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Figure = Annotated[float, Field(allow_inf_nan=False)]


def _printable(text: str) -> str:
    """Refuse what a reply's JSON, a log line or a terminal could not take."""
    if any(category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise ValueError("must not hold control characters, line breaks or lone surrogates")
    return text


_Printable = AfterValidator(_printable)
Word = Annotated[str, Field(min_length=1, max_length=64), _Printable]
Line = Annotated[str, Field(min_length=1, max_length=1000), _Printable]
Text = Annotated[str, Field(max_length=10_000), _Printable]
Figures = Annotated[dict[Word, Figure], Field(max_length=64)]
