"""Text encoders as frozen dataclasses: what a bundle's manifest says of the one it needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dd_core.bounds import Codes, Depth, Epsilon, Positions, Width
from dd_core.models.config import STRICT


@dataclass(frozen=True)
class MiniLMConfig:
    """A small BERT whose weights lie in the bundle (`text.safetensors`, `tokenizer.json`).

    The defaults are MiniLM-L6. `length` is the number of positions that a condition has, [CLS] and
    [SEP] among them: a longer prompt loses its last word pieces, and the table of places has no more rows.

    Raises:
        ValueError: sizes that are no architecture.
    """

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["minilm"] = "minilm"
    length: Positions = 16
    vocabulary: Codes = 30522
    dim: Width = 384
    layers: Depth = 6
    heads: Depth = 12
    hidden: Width = 1536
    norm_eps: Epsilon = 1e-12

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.dim, self.layers, self.heads, self.hidden) < 1 or self.length < 3:
            raise ValueError("an encoder has at least one of everything, and three positions")
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {self.dim} dimensions")


@dataclass(frozen=True)
class T5Config:
    """The encoder half of a T5 from the hub: too large for a bundle, which names it instead.

    The defaults are what LlamaGen's text models read: FLAN-T5-XL, 120 positions of 2,048.

    Raises:
        ValueError: a repository name or sizes that cannot be.
    """

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["t5"] = "t5"
    repo: Annotated[str, Field(max_length=200)] = "google/flan-t5-xl"
    revision: Annotated[str, Field(max_length=200)] = "main"
    length: Positions = 120
    dim: Width = 2048

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo, re.ASCII) or not re.fullmatch(
            r"[\w.-]+", self.revision, re.ASCII
        ):
            raise ValueError(f"{self.repo!r} at {self.revision!r} is no repository and revision")
        if self.length < 1 or self.dim < 1:
            raise ValueError("length and dim must be positive")


TextConfig = MiniLMConfig | T5Config
