"""How near an arithmetic's images are to another's: equal tokens, and the noise ratio of pixels.

Grey levels say nothing in bfloat16: a near tie between two codes changes a token, and its patch with it.
Images of the wrong weights or plan agree in one token of the codebook's size, and have 5 to 12 dB.

Shapes: B images, L tokens, C code dimension, H W pixels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import report
from dd_core.bundle import Bundle
from dd_core.codebook import nearest
from dd_core.condition import Condition, as_condition
from dd_core.noise import Key
from dd_core.plan import Plan
from dd_core.sampling import Sampler, decode, sample_codes


class Made(NamedTuple):
    """Final codes `[B, L, C]`, and images `[B, H, W, 3]` uint8 on the CPU."""

    codes_BLC: Tensor
    pixels: Tensor


class Agreement(NamedTuple):
    """Share of tokens that are the same code, and the peak signal-to-noise ratio of the pixels in dB (∞ where
    all are equal).
    """

    tokens: float
    psnr: float

    def row(self) -> dict[str, Any]:
        """For a result: JSON has no infinity."""
        return {"tokens": self.tokens, "psnr_db": self.psnr if math.isfinite(self.psnr) else None}


# Less is another image. With random weights, whose logits nearly tie, bfloat16 keeps fewest tokens.
LEAST = {"exact32": Agreement(0.99, 40.0), "fp16": Agreement(0.9, 25.0), "bf16": Agreement(0.75, 20.0)}


def agreement(found: Made, expected: Made, codebook_VC: Tensor) -> Agreement:
    """Compare images of the same conditions, noise and plan."""
    same = nearest(codebook_VC, found.codes_BLC) == nearest(codebook_VC, expected.codes_BLC)
    error = (found.pixels.double() - expected.pixels.double()).square().mean().item()
    return Agreement(same.double().mean().item(), 10 * math.log10(255**2 / error) if error else math.inf)


def check(found: Agreement, arithmetic: str, about: str) -> None:
    """Refuse images that the arithmetic's rounding does not explain.

    Raises:
        BenchmarkError: they are other images.
    """
    least = LEAST[arithmetic]
    if found.tokens < least.tokens or found.psnr < least.psnr:
        raise report.BenchmarkError(
            f"{about}: other images: {found.tokens:.1%} of tokens agree and {found.psnr:.1f} dB, "
            f"of at least {least.tokens:.0%} and {least.psnr:.0f} dB in {arithmetic}"
        )


@torch.inference_mode()
def make(sampler: Sampler, plan: Plan, cond: Condition, keys: list[Key]) -> Made:
    """Codes and images of a plan."""
    codes = sample_codes(sampler, plan, cond, keys)
    return Made(codes, decode(sampler, codes)[0].cpu())


def condition_of(bundle: Bundle, images: int, each: int = 1) -> Condition:
    """Classes, or prompts, of images: as many of each in a row."""
    numbers = [index // each for index in range(images)]
    if bundle.text is None:
        return as_condition([number % len(bundle.manifest.classes) for number in numbers])
    prompts = [f"a red {noun}" for noun in ("heart", "car", "house", "star")]
    return bundle.text.encode([prompts[number % len(prompts)] for number in numbers])
