"""Pixels through memory that both processes have mapped: the pipe copies them five times.

    device process: `put` ─▶ buffer; an answer says what lies there ─▶ server: `take`, before the next pass

The buffer is a file without a name, which /dev/shm, often 64 MB in containers, does not bound. It has two
halves that take turns: a device has at most two passes in flight.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Placed = tuple[tuple[int, ...], tuple[int, ...]]  # numbers of pictures, and the shape of each
_BYTES = 2**26  # of a half: 341 images of 256×256; memory is used as far as pixels have come


class PixelBuffer:
    """Memory of pixels; pickled for a process that starts, it is the same memory there.

    Args:
        file: its descriptor, which is closed with it.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._map = mmap.mmap(file, 0)
        self._puts = self._takes = 0

    @classmethod
    def new(cls) -> PixelBuffer | None:
        """An empty one; None on a system without nameless files: pixels then go through the pipe."""
        try:
            file = os.memfd_create("dd-pixels")
        except (AttributeError, OSError):
            return None
        os.ftruncate(file, 2 * _BYTES)
        return cls(file)

    def put(self, pictures: Mapping[int, Pixels]) -> Placed | None:
        """Copy pictures here, all of one shape; None where there are none, or more than fit."""
        if not pictures or sum(picture.nbytes for picture in pictures.values()) > len(self._map) // 2:
            return None
        numbers, shape = tuple(pictures), next(iter(pictures.values())).shape
        view = self._view(self._puts, len(numbers), shape)
        self._puts += 1
        for place, picture in zip(view, pictures.values(), strict=True):
            place[...] = picture
        return numbers, shape

    def take(self, placed: Placed) -> dict[int, Pixels]:
        """Copies of the pictures that one call of `put` put here, in the order of these calls."""
        numbers, shape = placed
        view = self._view(self._takes, len(numbers), shape)
        self._takes += 1
        return {number: picture.copy() for number, picture in zip(numbers, view, strict=True)}

    def close(self) -> None:
        """Give the memory back."""
        self._map.close()
        os.close(self._file)

    def _view(self, turn: int, count: int, shape: tuple[int, ...]) -> Pixels:
        whole, begin = (count, *shape), turn % 2 * (len(self._map) // 2)
        return np.frombuffer(self._map, np.uint8, math.prod(whole), begin).reshape(whole)

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _received, (reduction.DupFd(self._file),)


def _received(file: Any) -> PixelBuffer:
    return PixelBuffer(file.detach())
