"""Pictures for tests of what is around them."""

from __future__ import annotations

import torch
from torch import Tensor


def pictures_like(count: int, seed: int = 0) -> Tensor:
    """Smooth random pictures: white noise would leave most features at zero."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)
