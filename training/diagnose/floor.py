"""The tokenizer's reconstructions: what no sampler passes.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dd_core.codebook import lookup
from dd_core.models.protocols import Tokenizer
from dd_core.sampling import to_pixels
from training.data.images import scaled
from training.diagnose.finding import RULES, Finding, judged
from training.metrics.features import Extractor
from training.metrics.fid import frechet_distance


def floor(fids: Mapping[str, float]) -> Finding:
    """FID of reconstructions beside the teacher's and the student's, from an evaluation.

    Args:
        fids: by the names of rows, with `reconstruction`.
    """
    known = fids["reconstruction"]
    plans = {name: fids[name] for name in ("teacher", "dd-1", "dd-2") if name in fids}
    said = "".join(f", {name} {value:.1f}" for name, value in plans.items())
    says = f"FID of the tokenizer's reconstructions {known:.1f}{said}."
    numbers = {"reconstruction": known, **plans}
    if "teacher" not in plans:
        return Finding("floor", says, numbers, None, "A plan cannot be expected to pass it.")
    return judged("floor", says, numbers, known > RULES["floor"].limit * plans["teacher"])


@torch.inference_mode()
def quick_floor(
    tokenizer: Tokenizer, image_N3HW: Tensor, extractor: Extractor, device: torch.device
) -> Finding:
    """FID of a few images to their own reconstructions: too few to compare with an evaluation's figures."""
    parts = []
    for image in torch.split(image_N3HW, 50):
        tokens = tokenizer.encode(scaled(image.to(device)))
        parts.append(to_pixels(tokenizer.to_image(lookup(tokenizer.codebook_VC, tokens))).cpu())
    drawn = torch.cat(parts).permute(0, 3, 1, 2).contiguous()
    fid = frechet_distance(extractor(image_N3HW), extractor(drawn))
    count = len(image_N3HW)
    says = (
        f"FID of {count} held-out images to their own reconstructions {fid:.1f}: too few for a comparison, "
        "and 0 for a perfect tokenizer."
    )
    advice = "`dd-train evaluate` measures it beside the plans."
    return Finding("floor", says, {"quick_fid": fid, "images": count}, None, advice)
