"""Protocols of the models, as the sampling loop uses them.

Shapes: B batch, L tokens, C code dimension, V codebook size. A model keeps no state between
calls: the cache is an argument.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dd_core.cache import KVCache
from dd_core.condition import Condition
from dd_core.layout import TokenLayout


class Student(Protocol):
    """F_θ: predicts the final sequence from any point of a trajectory, in one pass."""

    @property
    def layout(self) -> TokenLayout: ...

    def predict(self, x_BLC: Tensor, cond: Condition, step_B: Tensor) -> tuple[Tensor, Tensor]:
        """`x` is final before each sample's step and noise after.

        Returns the embedding head's codes `[B, L, C]` and the logits head's `[B, L, V]`, raw at
        all positions (also at those that were final already).
        """
        ...


class Teacher(Protocol):
    """p(block | earlier blocks): one forward pass a block."""

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


class Tokenizer(Protocol):
    """Pixels ↔ codes."""

    @property
    def codebook_VC(self) -> Tensor: ...

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Image in [−1, 1] → token indices `[B, L]`."""
        ...

    def to_image(self, codes_BLC: Tensor) -> Tensor:
        """Codes or continuous embeddings → image `[B, 3, H, W]`, not clamped."""
        ...
