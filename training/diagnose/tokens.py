"""Codebook use, from the tokens of the training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.diagnose.finding import RULES, Finding, judged


def codebook(tokens: Tensor, size: int) -> Finding:
    """Codes that occur, and how evenly: exp of the entropy of their frequencies (perplexity).

    Args:
        tokens: of the training images, of any shape.
        size: number of codes.
    """
    count_V = torch.bincount(tokens.flatten().long(), minlength=size).double()
    used, share_V = int((count_V > 0).sum()), count_V / count_V.sum()
    perplexity = float(torch.special.entr(share_V).sum().exp())
    numbers = {"used": used, "codes": size, "perplexity": round(perplexity, 1)}
    says = (
        f"{used:,} of {size:,} codes occur in the training images, as evenly as {perplexity:,.0f} equally "
        "frequent ones."
    )
    if used < RULES["codebook"].limit * size:
        return judged("codebook", says, numbers, True)
    return judged("codebook", says, numbers, perplexity < RULES["evenness"].limit * size, "evenness")


def codebook_in_training(share: float, size: int, step: int) -> Finding:
    """Codes in use by the running counts of a tokenizer that is still in training.

    A collapse alone is judged: a code that is drawn now and then counts as out of use here.

    Args:
        share: of the codes, as the journal has it.
    """
    used = round(share * size)
    says = f"{used:,} of {size:,} codes are in use at step {step:,}, by a running count."
    return judged(
        "codebook", says, {"used": used, "codes": size}, share < RULES["evenness"].limit, "evenness"
    )


def first_judged(continuous_for: float, steps: int, decay: float) -> int:
    """The step of a tokenizer's training from which its running counts say something.

    Nothing is quantised before `continuous_for` of the run. Every code then begins with the mean count, and
    takes ln 0.1 / ln decay steps to fall to a tenth of it, below which it is out of use.
    """
    decaying = math.log(0.1) / math.log(decay) if decay else 1
    return math.ceil(continuous_for * steps + decaying)
