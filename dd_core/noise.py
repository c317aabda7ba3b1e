"""Noise as a function of (seed, image index) alone.

The noise is the identity of an image: one tensor of standard normal numbers feeds every step
of every plan. It is made on the CPU from a counter-based generator whose raw bits are
specified (Philox), so neither the batch, the device nor the library's version changes it.
"""

from __future__ import annotations

import hashlib

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


def batch_noise(keys: list[tuple[int, int]], tokens: int, code_dim: int) -> tuple[Tensor, Tensor]:
    """Noise of several images: (seed, index) pairs → `[B, L, C]` normal and `[B, L]` uniform."""
    normal = torch.stack([gaussian_noise(s, i, tokens, code_dim) for s, i in keys])
    uniform = torch.stack([uniform_noise(s, i, tokens) for s, i in keys])
    return normal, uniform
