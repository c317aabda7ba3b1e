"""The teacher on images that it learned from and on others, under their own conditions and others'.

Shapes: N images, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.models.protocols import Teacher
from dd_core.runtime import mixed_precision
from training.data.conditions import Conditions
from training.diagnose.finding import RULES, Finding, judged

Labelled = tuple[Tensor, Tensor]  # tokens [N, L] and labels [N]


@torch.inference_mode()
def nats(
    teacher: Teacher,
    tokens_NL: Tensor,
    labels_N: Tensor,
    conditions: Conditions,
    device: torch.device,
    batch: int,
) -> Tensor:
    """−log p of each image under a label's condition, in nats a token, `[N]`; `batch` images at a time."""
    found = []
    for tokens, labels in zip(torch.split(tokens_NL, batch), torch.split(labels_N, batch), strict=True):
        target = tokens.long().to(device)
        with mixed_precision(device):
            logits = teacher.forward(target, conditions(labels).to(device))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        found.append(loss.view_as(target).mean(1).cpu())
    return torch.cat(found)


def generalisation(score: Callable[[Tensor, Tensor], Tensor], known: Labelled, held_out: Labelled) -> Finding:
    """Cross entropy of images that the teacher learned from, and of others.

    Args:
        score: nats a token of images under labels, `[N]`.
    """
    on, off = score(*known), score(*held_out)
    gap = float(off.mean() - on.mean())
    spread = float((on.var() / len(on) + off.var() / len(off)).sqrt())
    says = (
        f"The teacher has {on.mean():.2f} nats a token on {len(on)} of its images and {off.mean():.2f} on "
        f"{len(off)} held-out ones."
    )
    numbers = {"train": float(on.mean()), "held_out": float(off.mean()), "gap_error": spread}
    return judged("teacher", says, numbers, gap > max(RULES["teacher"].limit, 2 * spread))


def condition(score: Callable[[Tensor, Tensor], Tensor], images: Labelled) -> Finding:
    """Share of images that the teacher finds likelier under their own condition than under another's."""
    tokens, labels = images
    others = labels.roll(1)
    own, other = score(tokens, labels), score(tokens, others)
    prefers = (own < other)[labels != others].float()
    share = float(prefers.mean())
    says = (
        f"{share:.0%} of {len(prefers)} images are likelier under their own condition than under another's "
        f"(a coin: 50%)."
    )
    numbers = {"share": share, "own": float(own.mean()), "other": float(other.mean())}
    return judged("condition", says, numbers, share < RULES["condition"].limit)
