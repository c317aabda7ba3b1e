"""A teacher's own mistakes, imitated: some of the tokens that it reads are others.

    tokens ─▶ draw_choices ─▶ Tokenizer.with_mistakes ─▶ tokens to read, tokens to predict

A teacher reads its own tokens where it learned from those of images, and draws those of a scale without
seeing each other. Mistakes teach it to go on from what does not fit, and an image is not the same in two
epochs. In next-scale order later scales make up for what was replaced (self-correction of Infinity, arXiv
2412.04431); the tokens alone are enough for that, since what they add up to is the aim.

Shapes: B batch, L tokens, V codebook size, M near codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEAR = 1 / 16  # of the codebook: a replacement is one of so many codes around the token's own


@torch.no_grad()
def near_codes(codebook_VC: Tensor) -> Tensor:
    """For every code the indices of those nearest to it, without itself: `[V, M]`, M = V / 16, at least 1."""
    distance_VV = torch.cdist(codebook_VC, codebook_VC).fill_diagonal_(torch.inf)
    return distance_VV.topk(max(1, int(_NEAR * len(codebook_VC))), largest=False).indices


def draw_choices(batch: int, length: int, near_VM: Tensor, most: float) -> Tensor:
    """Which near code each token becomes, 0 to M - 1, and -1 where it stays: `[B, L]` int64.

    Of each image a share of the tokens is replaced that is drawn evenly from 0 to `most`.
    """
    replaced_BL = torch.rand(batch, length) < most * torch.rand(batch, 1)
    return torch.randint(near_VM.shape[1], (batch, length)).where(replaced_BL, -1)
