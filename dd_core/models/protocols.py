"""Protocols of the models: all that the sampling loop and the training know of a family.

Shapes: B batch, L tokens, C code dimension, V codebook size; z is a tokenizer's continuous encoding, in
whatever shape its family has. A model keeps no state between calls: the cache is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from dd_core.cache import KVCache
from dd_core.condition import Condition
from dd_core.layout import TokenLayout

ALL_TOKENS = slice(None)


class Jump(Protocol):
    """F_θ for inference: predicts the final sequence from any point of a trajectory, in one pass."""

    @property
    def layout(self) -> TokenLayout: ...

    @property
    def block_L(self) -> Tensor:
        """Block of each token, on the model's device."""
        ...

    def predict(
        self, x_BLC: Tensor, cond: Condition, step_B: Tensor, chosen: slice = ALL_TOKENS
    ) -> tuple[Tensor, Tensor]:
        """`x` is final before each sample's step and noise after.

        Returns the embedding head's codes `[B, L, C]`, raw at all positions (also at those that were final
        already), and the logits head's of the `chosen` tokens, `[B, chosen, V]`.
        """
        ...


class Student(Jump, Protocol):
    """F_θ as it is trained."""

    # Modules with one entry a block, by their names, and those parameters of an entry that, at zero, make it
    # add nothing.
    GROWS: ClassVar[Mapping[str, tuple[str, ...]]]
    # Parameters that depend on the condition begin with one of these names.
    CONDITION: ClassVar[tuple[str, ...]]

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks."""
        ...

    def from_teacher(self, teacher: nn.Module, codebook_VC: Tensor) -> Self:
        """This student with the weights of a teacher of its family (line 1 of Algorithm 2).

        What only students have stays as it is.
        """
        ...


class BlockByBlock(Protocol):
    """A teacher for inference: p(block | earlier blocks), one forward pass a block."""

    @property
    def layout(self) -> TokenLayout: ...

    def null_like(self, cond: Condition) -> Condition:
        """The condition that stands for none, for as many images: classifier-free guidance."""
        ...

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` sequences, on the model's device."""
        ...

    def block_logits(self, tokens_BL: Tensor, cond: Condition, step: int, cache: KVCache) -> Tensor:
        """Logits of the tokens of block `step`, `[B, block size, V]`.

        Reads the tokens before the block that the cache does not hold yet (all of them after a
        jump: a prefill) and advances the cache past them. Sequences beyond the cache's batch are idle
        rows, there for the size of the products alone: their logits mean nothing.
        """
        ...


class Teacher(BlockByBlock, Protocol):
    """A teacher as it is trained."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks."""
        ...

    def forward(self, tokens_BL: Tensor, cond: Condition) -> Tensor:
        """Teacher forcing: logits of all tokens, `[B, L, V]`."""
        ...


class Quantized(NamedTuple):
    """A continuous encoding in codes, and what training has to make smaller.

    Without gradients for the codebook: it follows the vectors by a running mean.
    """

    tokens_BL: Tensor
    vectors_BLC: Tensor  # what was replaced by the codes
    z: Tensor  # the encoding that the codes give, as the decoder reads it
    commitment: Tensor  # how far the encoder is from the codes
    fit: Tensor  # how far what the codes pass through (φ) is from the encoder


class Pictures(Protocol):
    """A tokenizer for inference: codes → pixels."""

    @property
    def codebook_VC(self) -> Tensor: ...

    def to_image(self, codes_BLC: Tensor) -> Tensor:
        """Codes or continuous embeddings → image `[B, 3, H, W]`, not clamped."""
        ...


class Tokenizer(Pictures, Protocol):
    """Pixels ↔ codes, as it is trained."""

    def encode_continuous(self, image_B3HW: Tensor) -> Tensor:
        """Image in [−1, 1] → z."""
        ...

    def quantize(self, z: Tensor) -> Quantized:
        """Z → the nearest codes."""
        ...

    def decode_continuous(self, z: Tensor) -> Tensor:
        """z, or `Quantized.z` → image `[B, 3, H, W]`, not clamped."""
        ...

    @torch.no_grad()
    def set_codes(self, codes_VC: Tensor) -> None:
        """Replace the codebook, each code brought to where the family's codes are."""
        ...

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Image in [−1, 1] → token indices `[B, L]`."""
        ...

    def with_mistakes(self, tokens_BL: Tensor, near_VM: Tensor, choice_BL: Tensor) -> tuple[Tensor, Tensor]:
        """An image's tokens, some exchanged (`dd_core.codebook.exchanged`): those to read, and to predict."""
        ...
