"""Noise as a function of (seed, image index) alone.

The noise is the identity of an image: one tensor of standard normal numbers feeds every step
of every plan. It is made on the CPU from a counter-based generator whose raw bits are
specified (Philox), so neither the batch, the device nor the library's version changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


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


class Splice(NamedTuple):
    """From token `token` on, the noise of image `number` of another seed."""

    token: int
    seed: int
    number: int


class NoiseKey(NamedTuple):
    """Which noise an image is made of: that of (seed, number), and of each splice from its token on.

    A token follows from the noise up to itself and no further (both masks are causal by blocks), so images
    that share the noise of their first blocks share the tokens there, and the rest is drawn anew: X_t =
    Concat(X[:t−1], X_1[t:]) with another X_1. What is spliced is standard normal all the same.
    """

    seed: int
    number: int
    splices: tuple[Splice, ...] = ()


Key = NoiseKey | tuple[int, int]


def batch_noise(keys: Sequence[Key], tokens: int, code_dim: int) -> tuple[Tensor, Tensor]:
    """Noise of several images: keys → `[B, L, C]` normal and `[B, L]` uniform."""
    images = [_image_noise(NoiseKey(*key), tokens, code_dim) for key in keys]
    return torch.stack([normal for normal, _ in images]), torch.stack([uniform for _, uniform in images])


def _image_noise(key: NoiseKey, tokens: int, code_dim: int) -> tuple[Tensor, Tensor]:
    normal = gaussian_noise(key.seed, key.number, tokens, code_dim)
    uniform = uniform_noise(key.seed, key.number, tokens)
    for splice in key.splices:
        normal[splice.token :] = gaussian_noise(splice.seed, splice.number, tokens, code_dim)[splice.token :]
        uniform[splice.token :] = uniform_noise(splice.seed, splice.number, tokens)[splice.token :]
    return normal, uniform
