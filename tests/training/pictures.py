"""Pictures and a network small enough for tests of what is around them."""

from __future__ import annotations

import torch
from torch import Tensor


def pictures_like(count: int, seed: int = 0) -> Tensor:
    """Smooth random pictures: white noise would leave most features at zero."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)


class Mean:
    """A network for tests: the mean of each colour. Counts what it was asked for."""

    precision = "float32"

    def __init__(self, fingerprint: str = "mean", stop_after: int | None = None) -> None:
        self.fingerprint, self.stop_after, self.seen = fingerprint, stop_after, 0

    def __call__(self, image_N3HW: Tensor, /) -> Tensor:
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(image_N3HW)
        return image_N3HW.float().mean((2, 3))
