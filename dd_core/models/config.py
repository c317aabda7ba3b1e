"""Named architectures as frozen dataclasses: what a checkpoint's tensors must look like.

A config is everything that a model's shapes depend on. It goes into a bundle's manifest as
plain JSON and comes back through the same dataclass, which then holds its fields to their bounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from dd_core.bounds import Codes, Depth, Epsilon, Multipliers, Share, Side, Sides, Width
from dd_core.layout import TokenLayout

Family = Literal["llamagen", "var"]
# Manifests are untrusted: a field that an architecture does not have is refused.
STRICT: dict[str, Any] = {"extra": "forbid"}
_Blocks = Annotated[int, Field(ge=1, le=16)]
_TextTokens = Annotated[int, Field(ge=0, le=1024)]
_TextDim = Annotated[int, Field(ge=0, le=16_384)]


class _Autoencoder(ABC):
    """Down-sampling is `2 ** (len(channel_multipliers) - 1)`."""

    __pydantic_config__: ClassVar = STRICT
    family: ClassVar[Family]
    channel_multipliers: Multipliers

    @property
    def downsampling(self) -> int:
        return int(2 ** (len(self.channel_multipliers) - 1))

    @abstractmethod
    def with_side(self, side: int) -> Self:
        """The same architecture for a grid of `side` × `side` codes."""


class _Transformer(ABC):
    """The last row of the label table, `num_classes`, is the null class. Without `text_dim` the condition is
    a class.
    """

    __pydantic_config__: ClassVar = STRICT
    family: ClassVar[Family]
    dim: int
    heads: int
    num_classes: int
    text_tokens: int
    text_dim: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def null_class(self) -> int:
        return self.num_classes

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Transformer blocks."""

    @abstractmethod
    def with_layers(self, layers: int) -> Self:
        """The same architecture with another number of transformer blocks."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Side of the grid of codes that the decoder reads, in tokens."""

    @abstractmethod
    def with_side(self, side: int) -> Self:
        """The same architecture for a grid of `side` × `side` codes."""


class _Scales:
    """`sides` are those of the scales, in tokens."""

    sides: tuple[int, ...]

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(tuple(p * p for p in self.sides))


@dataclass(frozen=True)
class VQConfig(_Autoencoder):
    """LlamaGen's VQ tokenizer: encoder, l2-normalised codebook, decoder; the defaults are VQ-16."""

    codebook_size: Codes = 16384
    code_dim: Width = 8
    z_channels: Width = 256
    channels: Width = 128
    channel_multipliers: Multipliers = (1, 1, 2, 2, 4)
    res_blocks: _Blocks = 2
    family: ClassVar[Family] = "llamagen"

    def with_side(self, side: int) -> Self:
        del side  # convolutions alone
        return self


@dataclass(frozen=True)
class LlamaGenConfig(_Transformer):
    """LlamaGen's transformer, as a teacher and as a DD student.

    `grid` is the side of the square token grid (the layout is raster order over it). With
    `text_dim` the condition is `text_tokens` states of that size (120 of 2,048 for FLAN-T5-XL)
    instead of a class. The feed-forward width is a multiple of `hidden_multiple`.
    """

    layers: Depth = 12
    heads: Depth = 12
    dim: Width = 768
    codebook_size: Codes = 16384
    code_dim: Width = 8
    grid: Side = 16
    num_classes: Codes = 1000
    rope_base: Annotated[float, Field(ge=1, le=1e9)] = 10000.0
    norm_eps: Epsilon = 1e-5
    hidden_multiple: Width = 256
    text_tokens: _TextTokens = 0
    text_dim: _TextDim = 0
    family: ClassVar[Family] = "llamagen"

    @property
    def num_layers(self) -> int:
        return self.layers

    def with_layers(self, layers: int) -> Self:
        return replace(self, layers=layers)

    @property
    def side(self) -> int:
        return self.grid

    def with_side(self, side: int) -> Self:
        return replace(self, grid=side)

    @property
    def hidden(self) -> int:
        """Feed-forward width: two thirds of 4·dim, rounded up."""
        return -(-int(8 * self.dim / 3) // self.hidden_multiple) * self.hidden_multiple

    @property
    def prefix(self) -> int:
        """Positions in front of the tokens: the class, or the text."""
        return self.text_tokens if self.text_dim else 1

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.raster(self.grid * self.grid)


def scales(side: int) -> tuple[int, ...]:
    """Sides of VAR's scales up to `side`: each is four fifths of the next one, rounded, and the first is 1.

    For 16 these are the published 1, 2, 3, 4, 5, 6, 8, 10, 13, 16.
    """
    found = [side]
    while found[-1] > 1:
        found.append(min(found[-1] - 1, round(found[-1] * 0.8)))
    return tuple(reversed(found))


_VAR_256 = scales(16)


@dataclass(frozen=True)
class MultiScaleConfig(_Autoencoder, _Scales):
    """VAR's multi-scale VQVAE; the defaults are the published one (`vae_ch160v4096z32`).

    φ of a scale is one of `shared_phi` convolutions, mixed
    with its input by `phi_ratio`. The code dimension is `z_channels`.
    """

    codebook_size: Codes = 4096
    z_channels: Width = 32
    channels: Width = 160
    channel_multipliers: Multipliers = (1, 1, 2, 2, 4)
    res_blocks: _Blocks = 2
    sides: Sides = _VAR_256
    shared_phi: Depth = 4
    phi_ratio: Share = 0.5
    family: ClassVar[Family] = "var"

    @property
    def code_dim(self) -> int:
        return self.z_channels

    def with_side(self, side: int) -> Self:
        return self if side == self.sides[-1] else replace(self, sides=scales(side))


@dataclass(frozen=True)
class VARConfig(_Transformer, _Scales):
    """VAR's transformer, as a teacher and as a DD student.

    Args:
        depth: blocks; the published models have width 64·depth and `depth` heads.
        unit_length: queries and keys of unit length (all published models).
        shared_adaln: one adaptive-norm layer for all blocks (the 512-pixel d36).
        prefix_mask: a teacher's prefill is block-causal, as Algorithm 4 has it; False is what the
            released hybrid script does.
        student_mask: which tokens a student's position sees: `released` = earlier scales and itself
            (what the released checkpoints were trained with), `paper` = also its own scale (App. B),
            `checkpoint` = a mask that came with the weights.
        text_tokens, text_dim: the condition is the mean of at most `text_tokens` states of this size, and
            not a class. No published model of the family reads text.
    """

    depth: Depth = 16
    dim: Width = 1024
    heads: Depth = 16
    codebook_size: Codes = 4096
    code_dim: Width = 32
    sides: Sides = _VAR_256
    num_classes: Codes = 1000
    unit_length: bool = True
    shared_adaln: bool = False
    mlp_ratio: Annotated[float, Field(ge=0.01, le=64, allow_inf_nan=False)] = 4.0
    prefix_mask: bool = True
    student_mask: Literal["released", "paper", "checkpoint"] = "released"
    text_tokens: _TextTokens = 0
    text_dim: _TextDim = 0
    family: ClassVar[Family] = "var"

    @property
    def num_layers(self) -> int:
        return self.depth

    def with_layers(self, layers: int) -> Self:
        return replace(self, depth=layers)

    @property
    def side(self) -> int:
        return self.sides[-1]

    def with_side(self, side: int) -> Self:
        return self if side == self.sides[-1] else replace(self, sides=scales(side))

    @classmethod
    def of_depth(cls, depth: int) -> VARConfig:
        """A published size at 256 pixels."""
        return cls(depth=depth, dim=64 * depth, heads=depth)

    @property
    def hidden(self) -> int:
        """Feed-forward width."""
        return round(self.dim * self.mlp_ratio)


TokenizerConfig = VQConfig | MultiScaleConfig
ModelConfig = LlamaGenConfig | VARConfig
