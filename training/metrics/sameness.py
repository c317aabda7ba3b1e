"""One seed, one picture: how near a plan's pictures are to the teacher's of the same noise and condition.

    picture, teacher's picture ─▶ LPIPS, the same answer of the judge?, the same main colour?

A student learns the teacher's map from noise to tokens, so more steps should refine a picture and not replace
it. FID cannot say whether they do: it compares sets. The teacher's pictures of *another* seed and the same
condition say what these figures are for pictures that have only the condition in common.

Shapes: N pictures, H W pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from training.data.colours import main_hue, turn
from training.data.images import from_pixels
from training.losses.lpips import Lpips

CHANGED = 45.0  # degrees of hue: red to orange, or green to cyan, and not yet to another primary colour


@dataclass(frozen=True)
class Sameness:
    """Means over pairs of pictures.

    Args:
        teacher_lpips: perceptual distance, 0 for equal pictures.
        same_answer: share of pairs that the judge takes for the same class, or the same of 100 captions,
            right or wrong.
        same_colour: share whose main colour is the same.
    """

    teacher_lpips: float
    same_answer: float
    same_colour: float

    def figures(self) -> dict[str, float]:
        """By name, as a row has them."""
        return asdict(self)


def same_colour(hue_N: Tensor, other_N: Tensor) -> Tensor:
    """True `[N]` where hues lie within `CHANGED` degrees of each other, or both pictures are grey."""
    near = turn(hue_N, other_N) < CHANGED  # false for NaN
    return near | (hue_N.isnan() & other_N.isnan())


@dataclass(frozen=True, eq=False)
class TeachersPictures:
    """The pictures that others are held against.

    Args:
        image_NHW3: uint8, of the teacher, row i of condition i mod `conditions`.
        answer_N: what the judge takes each for.
    """

    image_NHW3: Tensor
    answer_N: Tensor
    conditions: int
    lpips: Lpips

    @cached_property
    def hue_N(self) -> Tensor:
        """Main colours."""
        return main_hue(self.image_NHW3)

    def against(self, image_NHW3: Tensor, answer_N: Tensor) -> Sameness:
        """Other pictures of the same noise and conditions, row by row."""
        return self._compare(image_NHW3, answer_N, main_hue(image_NHW3))

    def another_seed(self) -> Sameness | None:
        """The teacher's pictures against its next of the same condition; None where each has one alone."""
        k = self.conditions
        if len(self.image_NHW3) < 2 * k:
            return None
        return self._compare(self.image_NHW3[k:], self.answer_N[k:], self.hue_N[k:])

    def _compare(self, image_NHW3: Tensor, answer_N: Tensor, hue_N: Tensor) -> Sameness:
        """Pictures against as many first ones of the teacher's."""
        own = slice(len(image_NHW3))
        return Sameness(
            teacher_lpips=self._distance(self.image_NHW3[own], image_NHW3),
            same_answer=(self.answer_N[own] == answer_N).double().mean().item(),
            same_colour=same_colour(self.hue_N[own], hue_N).double().mean().item(),
        )

    @torch.inference_mode()
    def _distance(self, image_NHW3: Tensor, other_NHW3: Tensor, batch: int = 100) -> float:
        total = 0.0
        for pair in zip(torch.split(image_NHW3, batch), torch.split(other_NHW3, batch), strict=True):
            total += float(self.lpips(*(from_pixels(x) for x in pair)).double().sum())
        return total / len(image_NHW3)
