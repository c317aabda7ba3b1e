"""The classifier of the original Inception network, for the Inception score proper.

Our features are those of its trunk, so its last layer is all that is needed: `fc.weight` of pytorch-fid's
file, the network of 2015 in PyTorch's names. As in the original score the layer's bias is left out.

Shapes: N images, D = 2048 features, K = 1008 classes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd_core.errors import DDError
from dd_core.hub.checkpoint import read_checkpoint
from training.data.packages import DataError, cache_dir

log = logging.getLogger("dd_train")

FETCH = "fetch"
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
_SHAPE = (1008, 2048)


class Classifier:
    """Features `[N, D]` → class probabilities `[N, K]`.

    Args:
        source: a file of pytorch-fid's weights (`.pth` or safetensors), or `fetch`.

    Raises:
        DataError: the file cannot be had, or has no such layer.
    """

    def __init__(self, source: str) -> None:
        path = _fetched() if source == FETCH else Path(source)
        weight = _state(path).get("fc.weight")
        if weight is None or tuple(weight.shape) != _SHAPE:
            found = "none" if weight is None else str(list(weight.shape))
            raise DataError(
                f"{path}: the Inception score needs fc.weight {list(_SHAPE)} of the network of 2015 "
                f"(pytorch-fid's file), found {found}; torchvision's Inception is another network",
                param="inception",
            )
        self.name = f"pytorch-fid's ({path.name})"
        self.weight_KD: Tensor = weight.float()

    def __call__(self, features_ND: Tensor) -> Tensor:
        logits_NK: Tensor = features_ND @ self.weight_KD.T
        return logits_NK.double().softmax(1)


def _state(path: Path) -> dict[str, Any]:
    try:
        found = read_checkpoint(path)
    except (DDError, OSError) as error:
        raise DataError(f"no Inception weights: {error}", param="inception") from error
    return found if isinstance(found, dict) else {}


def _fetched() -> Path:
    """pytorch-fid's file in the cache; its name ends with the start of its SHA-256."""
    path = cache_dir() / URL.rpartition("/")[2]
    if not path.exists():
        log.info("fetching pytorch-fid's Inception weights")
        try:
            prefix = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"pytorch-fid's weights could not be fetched ({error}): put {path.name} into "
                f"{path.parent}, or name another place with --inception",
                param="inception",
            ) from error
    return path
