"""Conditions of a stage's labels: classes, or pictures and prompts that have texts.

The stages know labels only: integers that come with images or pairs. `Conditions` makes of them what
the models read.

Shapes: B batch, N labels, K captions of a label, M texts, T positions, D state dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dd_core.condition import ClassCondition, Condition, TextCondition


class Conditions(Protocol):
    """Labels → conditions, on the CPU."""

    @property
    def count(self) -> int:
        """N, how many labels there are."""

    def __call__(self, labels_B: Tensor) -> Condition:
        """`[B]` int64 → one row a label: `of(pick(labels))`."""

    def pick(self, labels_B: Tensor) -> Tensor:
        """Of each label one thing that it stands for, `[B]`; torch's generator draws it from several."""

    def of(self, picked_B: Tensor) -> Condition:
        """One row for each that was picked."""


@dataclass(frozen=True)
class ClassConditions:
    """A label is a class index: it is its own condition."""

    count: int

    def __call__(self, labels_B: Tensor) -> Condition:
        return self.of(labels_B)

    def pick(self, labels_B: Tensor) -> Tensor:
        return labels_B

    def of(self, picked_B: Tensor) -> Condition:
        return ClassCondition(picked_B)


@dataclass(frozen=True)
class TextConditions:
    """A label has one or more texts, of which one is drawn from torch's generator each time.

    Args:
        states_MTD, mask_MT: the states of all texts, as `PromptEncoder` gives them, in half precision.
        texts_NK: each label's texts; with K = 1 nothing is drawn.
    """

    states_MTD: Tensor
    mask_MT: Tensor
    texts_NK: Tensor

    @classmethod
    def of_prompts(cls, states_MTD: Tensor, mask_MT: Tensor) -> TextConditions:
        """Label i is text i."""
        return cls(states_MTD, mask_MT, torch.arange(len(states_MTD))[:, None])

    @property
    def count(self) -> int:
        return len(self.texts_NK)

    def __call__(self, labels_B: Tensor) -> Condition:
        return self.of(self.pick(labels_B))

    def pick(self, labels_B: Tensor) -> Tensor:
        choices = self.texts_NK[labels_B]
        if choices.shape[1] > 1:
            choices = choices.gather(1, torch.randint(choices.shape[1], (len(choices), 1)))
        return choices[:, 0]

    def of(self, picked_B: Tensor) -> Condition:
        return TextCondition(self.states_MTD[picked_B].float(), self.mask_MT[picked_B])


@dataclass(frozen=True)
class EncodedConditions:
    """A label is a prompt, which is encoded whenever it is asked for: the states of a large encoder take
    more room than a machine has (half a megabyte a prompt for FLAN-T5-XL).
    """

    prompts: Sequence[str]
    encode: Callable[[Sequence[str]], Condition]

    @property
    def count(self) -> int:
        return len(self.prompts)

    def __call__(self, labels_B: Tensor) -> Condition:
        return self.of(labels_B)

    def pick(self, labels_B: Tensor) -> Tensor:
        return labels_B

    def of(self, picked_B: Tensor) -> Condition:
        return self.encode([self.prompts[i] for i in picked_B.tolist()])


def spread(labels: int, images: int) -> list[int]:
    """Labels of a sheet of `images`: all in turn, or evenly spread where there are more than images."""
    stride = max(1, labels // images)
    return [i * stride % labels for i in range(images)]
