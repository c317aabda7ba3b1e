"""Noise as a function of (seed, image index) alone.

The noise is the identity of an image: one tensor of standard normal numbers feeds every step
of every plan. It is made on the CPU from a counter-based generator whose raw bits are
specified (Philox), so neither the batch, the device nor the library's version changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dd_core.layout import TokenLayout


def stream_seed(seed: int, index: int, stream: str) -> int:
    """A 63-bit seed for one named stream of one image (or one training step)."""
    digest = hashlib.blake2b(f"{seed}/{index}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _uniform(seed: int, index: int, stream: str, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`count` float64 numbers in (0, 1): 53 random bits and a half, so never 0 or 1."""
    key = hashlib.blake2b(f"{seed}/{index}/{stream}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gaussian_noise(seed: int, index: int, tokens: int, code_dim: int) -> Tensor:
    """The noise of one image, `[tokens, code_dim]` float32 on the CPU (Box–Muller)."""
    count = tokens * code_dim
    half = (count + 1) // 2
    u = _uniform(seed, index, "noise", 2 * half)
    radius, angle = np.sqrt(-2.0 * np.log(u[:half])), 2.0 * np.pi * u[half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(normal.astype(np.float32)).view(tokens, code_dim)


def uniform_noise(seed: int, index: int, tokens: int) -> Tensor:
    """One number in (0, 1) a token for multinomial draws, `[tokens]` float32 on the CPU."""
    u = _uniform(seed, index, "multinomial", tokens).astype(np.float32)
    return torch.from_numpy(u).clamp_(max=1.0 - 2.0**-24)


@dataclass(frozen=True)
class Splice:
    """From block `block` on, the noise of image `index` of another seed."""

    block: int
    seed: int
    index: int


@dataclass(frozen=True)
class NoiseKey:
    """The noise that an image is made of: that of image `index` of a seed, and of each splice from its
    block on. Splices ascend by block.

        NoiseKey(7, 0)                             image 0 of seed 7
        NoiseKey(7, 0, (Splice(20, 8, 2),))        the same up to block 20, then that of image 2 of seed 8

    A token follows from the noise up to itself and no further (both masks are causal by blocks), so images
    that share the noise of their first blocks share the tokens there, and the rest is drawn anew: X_t =
    Concat(X[:t−1], X_1[t:]) with another X_1. What is spliced is standard normal all the same.
    """

    seed: int
    index: int
    splices: tuple[Splice, ...] = ()

    @classmethod
    def of_seed(cls, seed: int, count: int) -> tuple[NoiseKey, ...]:
        """Images 0 to `count` − 1 of a seed."""
        return tuple(cls(seed, index) for index in range(count))

    @property
    def newest(self) -> NoiseKey | Splice:
        """The seed and index that the last tokens are drawn from: a variation is named by them."""
        return self.splices[-1] if self.splices else self

    def spliced(self, block: int, seed: int, index: int) -> NoiseKey:
        """A variation: the same up to `block`, and other noise from there on."""
        kept = tuple(splice for splice in self.splices if splice.block < block)
        return replace(self, splices=(*kept, Splice(block, seed, index)))


Key = NoiseKey | tuple[int, int]


def batch_noise(keys: Sequence[Key], layout: TokenLayout, code_dim: int) -> tuple[Tensor, Tensor]:
    """Noise of several images: keys → `[B, L, C]` normal and `[B, L]` uniform, float32 on the CPU."""
    known = [key if isinstance(key, NoiseKey) else NoiseKey(*key) for key in keys]
    images = [_image_noise(key, layout, code_dim) for key in known]
    return torch.stack([normal for normal, _ in images]), torch.stack([uniform for _, uniform in images])


def _image_noise(key: NoiseKey, layout: TokenLayout, code_dim: int) -> tuple[Tensor, Tensor]:
    tokens = layout.num_tokens
    normal = gaussian_noise(key.seed, key.index, tokens, code_dim)
    uniform = uniform_noise(key.seed, key.index, tokens)
    for splice in key.splices:
        rest = slice(layout.starts[splice.block], None)
        normal[rest] = gaussian_noise(splice.seed, splice.index, tokens, code_dim)[rest]
        uniform[rest] = uniform_noise(splice.seed, splice.index, tokens)[rest]
    return normal, uniform
