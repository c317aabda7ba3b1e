"""The student on its training pairs and on fresh ones; which tokens it gets right, and where.

Shapes: N pairs, L tokens, T blocks, C code dimension, V codebook size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.codebook import lookup
from dd_core.layout import TokenLayout
from dd_core.models.protocols import Student
from dd_core.runtime import mixed_precision
from dd_core.sampling import renoise
from training.data.conditions import Conditions
from training.diagnose.finding import RULES, Finding, judged

_NOTHING = 0.95  # of the nats of a blind guess: a student that has hardly begun


@dataclass(frozen=True)
class Known:
    """Pairs with all that a student is scored on: labels `[N]`, tokens `[N, L]`, noise `[N, L, C]`."""

    labels: Tensor
    tokens: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Scores:
    """Cross entropy in nats, and 1 where the likeliest token is the right one; `[N, L]`, from a step."""

    nats_NL: Tensor
    right_NL: Tensor
    layout: TokenLayout
    step: int

    def of_pairs(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Nats a token of each pair, `[N]`, in blocks from `start` (the step) up to `stop` (the end)."""
        return self.nats_NL[:, self._tokens(start, stop)].mean(1)

    def accuracy(self, start: int | None = None, stop: int | None = None) -> float:
        """Share of right tokens in those blocks."""
        return float(self.right_NL[:, self._tokens(start, stop)].mean())

    def by_block(self) -> list[float | None]:
        """Accuracy of each block; None before the step."""
        blocks = range(self.layout.num_blocks)
        return [None if t < self.step else round(self.accuracy(t, t + 1), 4) for t in blocks]

    def _tokens(self, start: int | None, stop: int | None) -> slice:
        starts = self.layout.starts
        return slice(
            starts[self.step if start is None else start],
            starts[self.layout.num_blocks if stop is None else stop],
        )


def at_once(logits: int) -> int:
    """Images of a forward pass, each with so many logits: 128 MiB of them in float32, or one image."""
    return max(1, min(100, 2**25 // logits))


@torch.inference_mode()
def score(
    student: Student,
    codebook_VC: Tensor,
    pairs: Known,
    step: int,
    conditions: Conditions,
    device: torch.device,
) -> Scores:
    """Hold a jump from X_t against the pairs' tokens, as the distillation's loss does (Algorithm 2)."""
    nats, right = [], []
    batch = at_once(student.layout.num_tokens * len(codebook_VC))
    parts = (torch.split(part, batch) for part in (pairs.labels, pairs.tokens, pairs.noise))
    for labels, tokens, noise in zip(*parts, strict=True):
        target = tokens.long().to(device)
        step_B = torch.full((len(target),), step, device=device)
        x_BLC = renoise(lookup(codebook_VC, target), noise.float().to(device), step_B, student.block_L)
        with mixed_precision(device):
            _, logits = student.predict(x_BLC, conditions(labels).to(device), step_B)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        nats.append(loss.view_as(target).cpu())
        right.append((logits.argmax(-1) == target).float().cpu())
    return Scores(torch.cat(nats), torch.cat(right), student.layout, step)


def difference(more: Tensor, less: Tensor) -> tuple[float, float]:
    """Mean of paired differences, and its standard error."""
    gap = more - less
    return float(gap.mean()), float(gap.std() / len(gap) ** 0.5)


def memorisation(trained: Mapping[int, Scores], fresh: Mapping[int, Scores]) -> Finding:
    """Cross entropy of its own pairs and of fresh ones, by the step that it jumps from.

    Args:
        trained, fresh: by step; pair i of both has one condition and noise of its own.
    """
    parts, numbers, trouble = [], {}, False
    for step in sorted(fresh):
        on, off = trained[step].of_pairs(), fresh[step].of_pairs()
        gap, error = difference(off, on)
        trouble |= gap > max(RULES["memorisation"].limit, 2 * error)
        numbers[f"step {step}"] = {
            "train": float(on.mean()),
            "fresh": float(off.mean()),
            "gap": gap,
            "gap_error": error,
        }
        parts.append(f"from step {step} {on.mean():.2f} and {off.mean():.2f} (± {error:.2f} between them)")
    count = len(next(iter(fresh.values())).nats_NL)
    says = f"The student's nats a token on its own pairs and on {count} fresh ones: {'; '.join(parts)}."
    return judged("memorisation", says, numbers, trouble)


def positions(fresh: Mapping[int, Scores], commonest: float, chance: float, adversarial: bool) -> Finding:
    """Accuracy on fresh pairs, in all and by block.

    Args:
        commonest: the accuracy of guessing the commonest token of each place.
        chance: nats a token of one who knows nothing, ln V.
        adversarial: the student has learned against a discriminator already.
    """
    first = min(fresh)
    one, blocks = fresh[first].accuracy(), fresh[first].layout.num_blocks
    cut = first + max(1, (blocks - first) // 4)
    early, late = fresh[first].accuracy(first, cut), fresh[first].accuracy(blocks - (cut - first))
    says = (
        f"{one:.1%} of the tokens of fresh pairs come out right in one step ({commonest:.1%} by always "
        f"taking a place's commonest token): {early:.1%} in the first quarter of the blocks, {late:.1%} in "
        "the last."
    )
    numbers = {
        "one_step": one,
        "commonest": commonest,
        "by_block": {f"step {t}": s.by_block() for t, s in sorted(fresh.items())},
    }
    knows_nothing = float(fresh[first].of_pairs().mean()) > _NOTHING * chance
    if knows_nothing or one < RULES["frequency"].limit * commonest:
        return judged("positions", says, numbers, True, "frequency")
    return judged("positions", says, numbers, one < RULES["positions"].limit and not adversarial)


def commonest_accuracy(known_NL: Tensor, others_NL: Tensor, size: int) -> float:
    """Share of tokens of `others` that are the commonest of their place in `known`."""
    length = known_NL.shape[1]
    flat = torch.arange(length) * size + known_NL.long()
    guess_L = torch.bincount(flat.flatten(), minlength=length * size).view(length, size).argmax(1)
    return float((others_NL.long() == guess_L).float().mean())
