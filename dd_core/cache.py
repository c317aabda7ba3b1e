"""The KV cache as an argument: allocated by the caller, advanced by the teacher.

Shapes: N layers, B batch, H heads, S positions (start token and tokens), E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the positions seen so far; the first `length` positions are valid.

    The tensors have their full size from the start and are written in place, so that their
    addresses and shapes stay the same for all steps of a sample.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def allocate(cls, shape: Sequence[int], like: Tensor) -> KVCache:
        """An empty cache of `[N, B, H, S, E]` twice, on the device and of the type of `like`."""
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    def write(self, layer: int, keys_BHSE: Tensor, values_BHSE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new positions of one layer after `length`; returns all valid keys and values."""
        stop, capacity = self.length + keys_BHSE.shape[2], self.keys.shape[3]
        assert stop <= capacity, f"cache of {capacity} positions asked to hold {stop}"
        self.keys[layer, :, :, self.length : stop] = keys_BHSE
        self.values[layer, :, :, self.length : stop] = values_BHSE
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, positions: int) -> None:
        """Counts `positions` as valid, once every layer has written them."""
        self.length += positions
