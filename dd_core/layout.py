"""A token order is numbers: block sizes, and all that follows from them without weights.

A *block* is a group of tokens that the teacher draws in one forward pass. Raster order has
blocks of one token, `(1,) * 256`; VAR's scales are `(1, 4, 9, 16, 25, 36, 64, 100, 169, 256)`.
A *step* is a block index, 0-based (the paper's t is 1-based: its {1, 6} is our {0, 5}).

Sequences that a transformer sees carry one more position in front, the start (condition)
token; the masks here include it, as a block of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from dd_core.errors import InvalidRequestError


@dataclass(frozen=True)
class TokenLayout:
    """Sizes of the blocks, in the order in which the teacher draws them.

    Args:
        starts: first token of each block, and L at the end: `T + 1` numbers.
        block_of: block index of each token: `L` numbers.

    Raises:
        InvalidRequestError: no blocks, or a block without tokens.
    """

    block_sizes: tuple[int, ...]
    # Plain fields: the lock of a cached property would break a compiled graph.
    starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    block_of: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.block_sizes or min(self.block_sizes) < 1:
            raise InvalidRequestError(
                f"block_sizes must be positive integers, at least one; got {self.block_sizes}",
                param="block_sizes",
            )
        blocks = tuple(k for k, size in enumerate(self.block_sizes) for _ in range(size))
        object.__setattr__(self, "starts", tuple(accumulate(self.block_sizes, initial=0)))
        object.__setattr__(self, "block_of", blocks)

    @classmethod
    def raster(cls, tokens: int) -> TokenLayout:
        """One token a block: the order of LlamaGen."""
        return cls((1,) * tokens)

    @property
    def num_blocks(self) -> int:
        """T, the number of the teacher's forward passes."""
        return len(self.block_sizes)

    @property
    def num_tokens(self) -> int:
        """L, the length of the sequence without the start token."""
        return self.starts[-1]

    def block_index(self, device: torch.device | None = None) -> Tensor:
        """Block of each token, `[L]` int64: a copy from the host, which no graph of a device could hold."""
        return torch.tensor(self.block_of, device=device)


def data_positions(block_L: Tensor, step_B: Tensor) -> Tensor:
    """True where a token is already final at `step_B`: `[B]` steps → `[B, L]` bool.

    Samples at different steps can share a batch, without a host synchronisation.

    Args:
        block_L: `TokenLayout.block_index` on the device of `step_B`; models keep it as a buffer.
    """
    return block_L < step_B[:, None]


def teacher_mask(layout: TokenLayout) -> Tensor:
    """Block-causal mask `[1 + L, 1 + L]`, True = may attend: `block[j] <= block[i]`."""
    block = torch.tensor((-1, *layout.block_of))
    return block[None, :] <= block[:, None]


def student_mask(layout: TokenLayout) -> Tensor:
    """Mask of the published students `[1 + L, 1 + L]`: `block[j] < block[i] or i == j`.

    Tokens of one block do not see each other (App. B of the paper says they do; the released
    checkpoints were trained as written here). For raster order this is the causal mask.
    """
    block = torch.tensor((-1, *layout.block_of))
    return (block[None, :] < block[:, None]) | torch.eye(len(block), dtype=torch.bool)


def paper_student_mask(layout: TokenLayout) -> Tensor:
    """Mask of App. B `[1 + L, 1 + L]`: tokens of one block see each other, as a teacher's do."""
    return teacher_mask(layout)
