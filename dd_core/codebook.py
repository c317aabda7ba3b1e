"""Codebook look-ups: index → code, code → nearest index.

Shapes: B batch, L tokens, C code dimension, V codebook size, M codes near a code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lookup(codebook_VC: Tensor, tokens_BL: Tensor) -> Tensor:
    """Rows of the codebook: `[B, L]` indices → `[B, L, C]` codes."""
    return torch.nn.functional.embedding(tokens_BL, codebook_VC)


def nearest(codebook_VC: Tensor, x_BLC: Tensor) -> Tensor:
    """Index of the code closest to each vector in Euclidean distance: `[..., C]` → `[...]`.

    argmin_j ‖x − c_j‖² = argmax_j (x·c_j − ½‖c_j‖²): one matrix product of size B·L×V. The
    difference tensor of size B×L×V×C is never formed. Ties go to the lower index.
    """
    with torch.autocast(x_BLC.device.type, enabled=False):  # near ties need all the bits
        half_norm_V = 0.5 * codebook_VC.square().sum(-1)
        return (x_BLC @ codebook_VC.T - half_norm_V).argmax(-1)


def exchanged(tokens_BL: Tensor, near_VM: Tensor, choice_BL: Tensor) -> Tensor:
    """Each token, or of the M codes near it the chosen one; where the choice is -1 it stays: `[B, L]`."""
    return torch.where(choice_BL < 0, tokens_BL, near_VM[tokens_BL, choice_BL.clamp(min=0)])
