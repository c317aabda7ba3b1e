"""Images with their labels, and what a bundle says of them.

`training.data.sources` says where a run's images come from.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

# Of files that are pictures by their names.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif"})
# Of all the kinds that Pillow's readers raise on broken files.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class About:
    """The data of a bundle; `classes` is empty where texts are the condition. `examples`: what to show."""

    description: str
    classes: tuple[str, ...]
    data: str
    examples: tuple[str, ...] = ()
    licence: str = "MIT (the weights)"


@dataclass(frozen=True)
class ImageSet:
    """Images `[N, 3, S, S]` uint8, which may lie on disk, and labels `[N]` int64."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> ImageSet:
        """The first `count` images; all for 0, and where there are fewer."""
        count = count or len(self.labels)
        return ImageSet(self.images[:count], self.labels[:count])

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [−1, 1] float32, and labels, of the given indices."""
        return scaled(self.images[index]), self.labels[index]


def scaled(image: Tensor) -> Tensor:
    """uint8 of any shape → [−1, 1] float32."""
    return image.float().div(127.5).sub(1)


def from_pixels(image_NHW3: Tensor) -> Tensor:
    """Pictures as they are served → `[N, 3, H, W]` in [−1, 1]: `dd_core.sampling.to_pixels` undone."""
    return scaled(image_NHW3.permute(0, 3, 1, 2))
