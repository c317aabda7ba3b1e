"""Pictures for tests of what is around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor


def pictures_like(count: int, seed: int = 0) -> Tensor:
    """Smooth random pictures: white noise would leave most features at zero."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 255).to(torch.uint8)


def draw_folder(folder: Path, counts: Mapping[str, int], size: tuple[int, int] = (64, 64)) -> Path:
    """A folder of PNGs with a sub-folder a class: an ellipse on a ground, each in colours of its own."""
    for k, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.new("RGB", size, (40 * k % 256, 90, 7 * i % 256))
            box = (8 + i % 9, 6 + i % 7, 40 + i % 11, 50)
            ImageDraw.Draw(picture).ellipse(box, fill=(200 - 3 * i % 200, 60 * k % 256, 30))
            picture.save(folder / name / f"{i}.png")
    return folder
