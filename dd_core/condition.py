"""The condition of an image: a class index, or the states of a text.

The sampling loop treats both alike: a condition is one row an image, and a model's "no condition" is
another condition of the same kind, for classifier-free guidance.

Shapes: B batch, T text positions, N text state dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.errors import InvalidRequestError


@dataclass(frozen=True, eq=False)
class Condition:
    """Conditions of B images. The fields of a kind are tensors whose first dimension is B."""

    noun: ClassVar[str]

    def __len__(self) -> int:
        """B, the number of images."""
        return len(getattr(self, fields(self)[0].name))

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def joined(self, *others: Self) -> Self:
        """These rows, then those of the others."""
        return self._each(lambda *t: torch.cat(t), *others)

    def select(self, index: Tensor | slice) -> Self:
        """Some rows, in the order of `index`."""
        return self._each(lambda t: t[index])

    def padded(self, idle: int) -> Self:
        """With `idle` more rows of zeros: of class 0, or of a text that is all padding."""
        return self._each(lambda t: F.pad(t, (0, 0) * (t.dim() - 1) + (0, idle)))

    def blank(self, rows: int) -> Self:
        """Rows of zeros, of the same kind, on the same device."""
        return self._each(lambda t: t.new_zeros(rows, *t.shape[1:]))

    def write(self, other: Self, index: Tensor | slice = slice(None)) -> None:
        """Put the rows of `other` in the place of some of these, on the same memory."""
        self._each(
            lambda t, new: t.index_copy_(0, index, new) if isinstance(index, Tensor) else t[index].copy_(new),
            other,
        )

    def where(self, first_B: Tensor, other: Self) -> Self:
        """These rows where `first_B` is True, else those of `other`."""
        return self._each(lambda a, b: torch.where(first_B.view(-1, *[1] * (a.dim() - 1)), a, b), other)

    def _each(self, function: Callable[..., Tensor], *others: Self) -> Self:
        """`function` of each field, of these conditions and of others of the same kind."""
        assert all(type(other) is type(self) for other in others), "a model reads one kind of condition"
        return type(self)(*(function(*(getattr(c, f.name) for c in (self, *others))) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class ClassCondition(Condition):
    """Class indices.

    Args:
        labels_B: int64.
    """

    noun = "class indices"
    labels_B: Tensor

    def filled(self, label: int) -> ClassCondition:
        """The same class for as many images."""
        return ClassCondition(torch.full_like(self.labels_B, label))


@dataclass(frozen=True, eq=False)
class TextCondition(Condition):
    """States of a text encoder, left-padded: the last positions are the text's.

    Args:
        states_BTN: zero at padding.
        mask_BT: True at the text's own positions.
    """

    noun = "text states"
    states_BTN: Tensor
    mask_BT: Tensor


Kind = TypeVar("Kind", bound=Condition)


def of_kind(cond: Condition, kind: type[Kind]) -> Kind:
    """The condition as the kind that a model reads.

    Raises:
        InvalidRequestError: a class for a model that reads text, or the reverse.
    """
    if not isinstance(cond, kind):
        raise InvalidRequestError(f"this model is conditioned on {kind.noun}", param="condition")
    return cond


def as_condition(cond: Sequence[int] | Tensor | Condition) -> Condition:
    """A condition as it is; class indices, in a list or a tensor, as a condition."""
    return cond if isinstance(cond, Condition) else ClassCondition(torch.as_tensor(cond, dtype=torch.long))
