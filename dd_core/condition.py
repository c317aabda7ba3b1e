"""What an image is conditioned on: class indices, or the states of a text.

The sampling loop treats both alike. A condition is one row an image, and can be joined with the
model's "no condition" for classifier-free guidance, and padded to a size.

Shapes: B batch, T text positions, N text state dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """States of a text encoder, left-padded: the last positions are the text's.

    Args:
        states_BTN: zero at padding.
        mask_BT: True at the text's own positions.
    """

    states_BTN: Tensor
    mask_BT: Tensor

    def to(self, device: torch.device) -> TextCondition:
        """The same on `device`."""
        return TextCondition(
            self.states_BTN.to(device, non_blocking=True), self.mask_BT.to(device, non_blocking=True)
        )


Condition = Tensor | TextCondition


def left_padded(states_BTN: Tensor, mask_BT: Tensor) -> TextCondition:
    """From an encoder's right-padded output: valid rows move to the end, the others become zero.

    Args:
        mask_BT: 1 or True for valid positions, which come first.
    """
    length, valid = states_BTN.shape[1], mask_BT.bool()
    shift = valid.sum(1, keepdim=True)
    index = (torch.arange(length, device=states_BTN.device) + shift) % length
    moved = states_BTN.gather(1, index[..., None].expand_as(states_BTN))
    mask = valid.flip(1)
    return TextCondition(moved * mask[..., None].to(moved.dtype), mask)


def rows(cond: Condition) -> int:
    """B, the number of images."""
    return len(cond) if isinstance(cond, Tensor) else len(cond.states_BTN)


def joined(a: Condition, b: Condition) -> Condition:
    """Rows of `a`, then rows of `b`."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        return torch.cat([a, b])
    assert isinstance(b, TextCondition)
    return TextCondition(
        torch.cat([a.states_BTN, b.states_BTN.expand_as(a.states_BTN)]), torch.cat([a.mask_BT, b.mask_BT])
    )


def on_device(cond: Condition, device: torch.device) -> Condition:
    """The same on `device`."""
    return cond.to(device, non_blocking=True) if isinstance(cond, Tensor) else cond.to(device)


def chosen(cond: Condition, index: Tensor | slice) -> Condition:
    """Some rows, in the order of `index`."""
    if isinstance(cond, Tensor):
        return cond[index]
    return TextCondition(cond.states_BTN[index], cond.mask_BT[index])


def stacked(conds: Sequence[Condition]) -> Condition:
    """All rows of conditions of one kind, as one."""
    first = conds[0]
    if isinstance(first, Tensor):
        return torch.cat([c for c in conds if isinstance(c, Tensor)])
    texts = [c for c in conds if isinstance(c, TextCondition)]
    return TextCondition(torch.cat([c.states_BTN for c in texts]), torch.cat([c.mask_BT for c in texts]))


def select(first_B: Tensor, a: Condition, b: Condition) -> Condition:
    """Rows of `a` where `first_B` is True, else of `b`."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        return torch.where(first_B, a, b)
    assert isinstance(b, TextCondition)
    states = torch.where(first_B[:, None, None], a.states_BTN, b.states_BTN)
    return TextCondition(states, torch.where(first_B[:, None], a.mask_BT, b.mask_BT))


def padded(cond: Condition, idle: int) -> Condition:
    """`idle` more rows, of class 0 or of a text that is all padding."""
    if isinstance(cond, Tensor):
        return F.pad(cond, (0, idle))
    return TextCondition(F.pad(cond.states_BTN, (0, 0, 0, 0, 0, idle)), F.pad(cond.mask_BT, (0, 0, 0, idle)))
