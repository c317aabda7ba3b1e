"""Pixels through memory that both processes have mapped: the pipe copies them five times.

    device process: `put` ─▶ buffer ─ Done, which says what lies there ─▶ server: `take`, before the next pass

The buffer is a file without a name, which /dev/shm, often 64 MB in containers, does not bound. One is enough:
a device has one pass in flight.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from multiprocessing import reduction
from typing import Any

import numpy as np

from server.devices.messages import Done

_BYTES = 2**26  # 341 images of 256×256; memory is used as far as pixels have come


class PixelBuffer:
    """Memory of pixels; pickled for a process that starts, it is the same memory there.

    Args:
        file: its descriptor, which is closed with it.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._map = mmap.mmap(file, 0)

    @classmethod
    def new(cls) -> PixelBuffer | None:
        """An empty one; None on a system without nameless files: pixels then go through the pipe."""
        try:
            file = os.memfd_create("dd-pixels")
        except (AttributeError, OSError):
            return None
        os.ftruncate(file, _BYTES)
        return cls(file)

    def put(self, done: Done) -> Done:
        """Move the pictures of an answer here, all of one shape; those that do not fit stay in it."""
        pictures = list(done.pictures.values())
        if not pictures or sum(picture.nbytes for picture in pictures) > len(self._map):
            return done
        shape = pictures[0].shape
        for place, picture in zip(self._view((len(pictures), *shape)), pictures, strict=True):
            place[...] = picture
        return replace(done, pictures={}, placed=(tuple(done.pictures), shape))

    def take(self, done: Done) -> Done:
        """An answer with its pictures, copied from here."""
        if done.placed is None:
            return done
        numbers, shape = done.placed
        view = self._view((len(numbers), *shape))
        found = {number: picture.copy() for number, picture in zip(numbers, view, strict=True)}
        return replace(done, pictures=found, placed=None)

    def close(self) -> None:
        """Give the memory back."""
        self._map.close()
        os.close(self._file)

    def _view(self, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(self._map, np.uint8, count=int(np.prod(shape))).reshape(shape)

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _received, (reduction.DupFd(self._file),)


def _received(file: Any) -> PixelBuffer:
    return PixelBuffer(file.detach())
