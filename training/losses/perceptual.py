"""What VGG16's maps say of drawn pictures beside real ones: LPIPS, and a discriminator's opinion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.runtime import mixed_precision
from training.losses.adversarial import Adversary
from training.losses.lpips import Lpips


def perceived(
    lpips: Lpips,
    judge: Adversary | None,
    real_B3HW: Tensor,
    drawn_B3HW: Tensor,
    share: float,
    enlarged: int = 1,
    unpaired_U3HW: Tensor | None = None,
) -> dict[str, Tensor]:
    """`lpips` and, of a judge, `fooled` and `hinge`; each is `share` of a mean over the batch.

    The judge learns from the pictures meanwhile. Gradients flow to the drawn ones alone.

    Args:
        unpaired_U3HW: drawn pictures that none of the real ones belongs to: for the judge alone.
        enlarged: how many times as wide and high VGG16 sees the pictures. Of 32 pixels its last map has four
            places, and knows little of what Inception, which sees 299, will find.
    """
    with mixed_precision(real_B3HW.device):
        with torch.no_grad():
            real = lpips.features(enlarge(real_B3HW, enlarged))
        pictures = drawn_B3HW if unpaired_U3HW is None else torch.cat([drawn_B3HW, unpaired_U3HW])
        drawn = lpips.features(enlarge(pictures, enlarged))
    paired = [maps[: len(real_B3HW)] for maps in drawn]
    found = {"lpips": share * lpips.distance(paired, real).mean()}
    return found if judge is None else found | judge.opinions(real, drawn, share)


def enlarge(image_B3HW: Tensor, times: int) -> Tensor:
    """The pictures `times` as wide and high, bilinear."""
    return F.interpolate(image_B3HW, scale_factor=times, mode="bilinear") if times > 1 else image_B3HW
