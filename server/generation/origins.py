"""What one image is made of: a seed, the image's number, and which blocks are of other noise.

Origin(7, 0)                              image 0 of seed 7
Origin(7, 0, (Change(20, 8, 2),))         the same up to block 20, then the noise of image 2 of seed 8
"""

from __future__ import annotations

from typing import NamedTuple

from dd_core.layout import TokenLayout
from dd_core.noise import NoiseKey, Splice


class Change(NamedTuple):
    """From block `block` on, the noise of image `number` of another seed."""

    block: int
    seed: int
    number: int


class Origin(NamedTuple):
    """The noise of image `number` of a seed, but for `changes`, whose blocks ascend."""

    seed: int
    number: int
    changes: tuple[Change, ...] = ()

    def key(self, layout: TokenLayout) -> NoiseKey:
        """The same, counted in tokens."""
        splices = tuple(Splice(layout.starts[c.block], c.seed, c.number) for c in self.changes)
        return NoiseKey(self.seed, self.number, splices)

    @property
    def newest(self) -> Origin | Change:
        """The seed and number that the last tokens are drawn from: a variation is named by them."""
        return self.changes[-1] if self.changes else self

    def changed(self, block: int, seed: int, number: int) -> Origin:
        """A variation: the same up to `block`, and other noise from there on."""
        kept = tuple(change for change in self.changes if change.block < block)
        return self._replace(changes=(*kept, Change(block, seed, number)))


def origins_of(seed: int, count: int) -> tuple[Origin, ...]:
    """Images 0 to `count` − 1 of a seed."""
    return tuple(Origin(seed, number) for number in range(count))
