"""Data of the next update, made by a thread while this one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ahead(Generic[T]):
    """The results of `make(step)` for one step after the other.

    Args:
        make: a function of the step alone: what is random is drawn by the update, from torch's generator.
        steps: the number of steps, of which the last has no next one.
    """

    def __init__(self, make: Callable[[int], T], steps: int) -> None:
        self._make, self._steps = make, steps
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._next: tuple[int, Future[T]] | None = None

    def at(self, step: int) -> T:
        """The data of a step; those of the next one are begun.

        Raises:
            Exception: as `make`.
        """
        known = self._next if self._next and self._next[0] == step else None
        found = known[1] if known else self._thread.submit(self._make, step)
        self._next = (step + 1, self._thread.submit(self._make, step + 1)) if step + 1 < self._steps else None
        return found.result()


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory that a GPU copies from while it computes; as it is where `device` is a CPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a copy of pinned memory is not waited for."""
    return tensor.to(device, non_blocking=True)
