"""Attention of a next-scale student without its mask: scale by scale over what each may see.

    scale k: queries of the scale ─▶ all earlier positions ─▶ merged with the position itself

The mask of the published students is "all earlier scales, and itself". A mask of booleans is computed over
whole squares and keeps the fused kernel from its fastest path; of VAR's 681² pairs, 38 % are seen.

Shapes: B batch, H heads, S positions (start token and tokens), E head dimension.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.layout import TokenLayout

# Scales up to here are computed together, under their mask: alone they are too small to gain, and attention
# of few queries rounds by the batch.
_TOGETHER = 16


class Part(NamedTuple):
    """Queries `first..stop-1`, which see the keys `0..keys-1`, and themselves where `itself`."""

    first: int
    stop: int
    keys: int
    itself: bool


def parts(layout: TokenLayout, kind: str) -> list[Part]:
    """The scales that are computed alone: those with 16 positions or more before them.

    Args:
        kind: `VARConfig.student_mask`. A mask that came with a checkpoint may be any: there are no parts.
    """
    if kind == "checkpoint":
        return []
    edges = [1 + start for start in layout.starts]  # behind the start token
    large = [pair for pair in pairwise(edges) if pair[0] >= _TOGETHER]
    return [Part(a, b, a if kind == "released" else b, kind == "released") for a, b in large]


class ScaleAttention(nn.Module):
    """softmax(scale · q kᵀ, where the mask allows it) v, `[B, S, H·E]`, for the mask of a layout's students.

    Args:
        mask_SS: True = may attend; read for the leading scales; for all where `kind` does not say it.
    """

    mask: Tensor

    def __init__(self, layout: TokenLayout, kind: str, mask_SS: Tensor) -> None:
        super().__init__()
        self.parts = parts(layout, kind) if mask_SS.device.type == "cpu" else []
        self.lead = self.parts[0].first if self.parts else len(mask_SS)
        self.register_buffer("mask", mask_SS[: self.lead, : self.lead], persistent=False)

    def forward(self, q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, scale: float) -> Tensor:
        q, k, v = q_BHSE, k_BHSE, v_BHSE
        lead = slice(self.lead)
        out = [
            F.scaled_dot_product_attention(
                q[:, :, lead], k[:, :, lead], v[:, :, lead], self.mask, scale=scale
            )
        ]
        for first, stop, keys, itself in self.parts:
            here, seen = slice(first, stop), slice(keys)
            found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, here], k[:, :, seen], v[:, :, seen], scale=scale
            )
            out.append(
                _merged(found, log_sum, q[:, :, here], k[:, :, here], v[:, :, here], scale)
                if itself
                else found
            )
        return torch.cat(out, 2).transpose(1, 2).flatten(2)


def _merged(found: Tensor, log_sum_BHS: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The attention `found`, of which the softmax's denominator is known, and the position itself."""
    own = (q.to(log_sum_BHS.dtype) * k).sum(-1) * scale
    share = torch.sigmoid(own - log_sum_BHS)[..., None]
    return torch.lerp(found.to(share.dtype), v.to(share.dtype), share).to(found.dtype)
