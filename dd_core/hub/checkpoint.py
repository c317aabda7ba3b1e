"""A published checkpoint file → its state dict, without running anything that is inside.

A `.pt` or `.pth` file is a pickle, which may hold code. It is read by torch's restricted reader
(`weights_only=True`): tensors and plain containers come back, anything else is refused. Tensors stay on
disk, mapped into memory, where the file's format allows it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dd_core.errors import WeightsError

# Training scripts keep their arguments beside the weights. A namespace is a container: making one
# runs nothing.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace]

_WRAPPERS = ("module.", "_orig_mod.")


def read_checkpoint(path: Path) -> Any:
    """The contents of a safetensors file, or of a torch file of either format.

    Raises:
        WeightsError: no such file, damaged, or one that needs more than a reader of weights.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file", param=path.name)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        archive = is_zipfile(path)  # which torch can map; files from before torch 1.6 are none
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file: {error}", param=path.name) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        raise WeightsError(f"{path}: {_why(error)}", param=path.name) from error


def _why(error: Exception) -> str:
    text = str(error)
    wanted = re.search(r"GLOBAL (\S+)", text)
    if wanted is not None:
        return (
            f"it holds more than weights ({wanted[1]}), and reading that could run code, so it is "
            "refused. If you trust the file, load it yourself and save its state dict as safetensors"
        )
    if "weights_only" in text.lower() or "weights only" in text.lower():
        return "it holds more than weights, and reading that could run code, so it is refused"
    first = text.strip().splitlines()
    return f"damaged, or not a torch file ({first[0] if first else type(error).__name__})"


def state_dict_at(
    content: Any, places: tuple[tuple[str, ...], ...], source: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict inside a checkpoint, and the place where it was.

    Args:
        places: paths of keys, tried in order; the first that leads to a mapping of tensors counts. A prefix
            of all its keys that a training script's wrappers put there is taken off.

    Raises:
        WeightsError: none does; the message says what is there.
    """
    for place in places:
        found: Any = content
        for key in place:
            found = found.get(key) if isinstance(found, Mapping) else None
        items = found.items() if isinstance(found, Mapping) else ()
        if items and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
            return _unwrapped(dict(items)), place
    there = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    looked = " or ".join("".join(f"[{key!r}]" for key in place) or "its top level" for place in places)
    shown = there if len(there) <= 200 else there[:200] + "…"
    raise WeightsError(
        f"{source}: no state dict in {looked}; the file holds {shown}", param=Path(source).name
    )


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes of DistributedDataParallel and torch.compile."""
    for prefix in _WRAPPERS * 2:  # in either order
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
