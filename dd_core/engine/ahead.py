"""Noise of images that are waited for, made in threads while the device computes.

    admitted ─ begin ─▶ threads ─ … ─ take ─▶ noise, when the image's first pass begins

Of 680 tokens by 32 numbers it takes a millisecond of a core, half of what a fast GPU needs for the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor

from dd_core.layout import TokenLayout
from dd_core.noise import Key, batch_noise

_THREADS = 4
_MOST = 2048  # images whose noise is kept for those who may never come


class NoiseAhead:
    """`batch_noise`, begun before it is asked for. Any thread may call it.

    Args:
        threads: that make noise.
        most: the oldest beyond so many is forgotten, and made when it is asked for after all.
    """

    def __init__(
        self, layout: TokenLayout, code_dim: int, threads: int = _THREADS, most: int = _MOST
    ) -> None:
        self._layout, self._code_dim, self._most = layout, code_dim, most
        self._pool = ThreadPoolExecutor(threads, "dd-noise")
        self._made: dict[Key, Future[tuple[Tensor, Tensor]]] = {}
        self._lock = Lock()

    def begin(self, keys: Iterable[Key]) -> None:
        """Make the noise of images, some time soon."""
        with self._lock:
            for key in keys:
                if key not in self._made:
                    self._made[key] = self._pool.submit(batch_noise, [key], self._layout, self._code_dim)
            for key in list(self._made)[: -self._most]:
                self._made.pop(key).cancel()

    def take(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """The noise of images, as `batch_noise` gives it; what was not begun is made now."""
        self.begin(keys)
        with self._lock:
            futures = {key: self._made.pop(key) for key in dict.fromkeys(keys) if key in self._made}
        rows = {key: future.result() for key, future in futures.items()}
        missing = [key for key in dict.fromkeys(keys) if key not in rows]  # more than are kept
        rows |= {key: batch_noise([key], self._layout, self._code_dim) for key in missing}
        return torch.cat([rows[key][0] for key in keys]), torch.cat([rows[key][1] for key in keys])
