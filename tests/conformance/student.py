"""What both families' students are held to: every step, mixed steps, every split, few-step loops.

Shapes: B batch, L tokens, C code dimension, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dd_core import plan
from dd_core.codebook import lookup, nearest
from dd_core.condition import ClassCondition
from dd_core.layout import data_positions
from dd_core.models.protocols import Student, Tokenizer
from dd_core.sampling import Sampler, SegmentRun, renoise, run_plan, student_jump
from tests.conformance.report import Fixture


def check_student(
    fixture: Fixture,
    student: Student,
    tokenizer: Tokenizer,
    tokens_BL: Tensor,
    *,
    steps: Sequence[int],
    splits: Sequence[int],
    sequence: str,
    to_unit: Callable[[Tensor], Tensor],
) -> None:
    """Compares `t{t}.*`, `mixed.*` and `few{n}.*`.

    Args:
        sequence: the recorded name of a sequence after a split.
        to_unit: the family's way from decoder output to an image in [0, 1].
    """
    labels, noise = ClassCondition(fixture.inputs("labels")), fixture.inputs("noise")
    codebook, layout = tokenizer.codebook_VC.detach(), student.layout
    data = lookup(codebook, tokens_BL)
    groups = {f"t{t}": torch.full((len(labels),), t) for t in steps}
    groups["mixed"] = torch.tensor(fixture.cases["mixed_t"])
    for name, step in groups.items():
        x = renoise(data, noise, step, student.block_L)
        embeddings, logits = student.predict(x, labels, step)
        fixture.compare(f"{name}.x_t", x)
        fixture.compare(f"{name}.tokens", embeddings)
        fixture.compare(f"{name}.logits", logits)
        final = data_positions(student.block_L, step)
        fixture.compare(f"{name}.final_tokens", torch.where(final[..., None], x, embeddings))
        known = torch.full_like(logits, -math.inf)
        known.scatter_(-1, nearest(codebook, x)[..., None], 0.0)
        fixture.compare(f"{name}.final_logits", torch.where(final[..., None], known, logits))
        for split in splits:
            quantity = f"{name}.{sequence}.split{split}"
            if fixture.has(quantity):
                split_B = torch.full_like(step, split)
                fixture.compare(quantity, student_jump(student, codebook, x, labels, step, split_B))
    uniform = torch.full(noise.shape[:2], 0.5)
    for number, case in enumerate(fixture.cases["fewstep"]):
        t_list, split = case["t_list"], case["split_t"]
        x = noise
        for j, t in enumerate(t_list):
            step = torch.full((len(labels),), t)
            x = renoise(x, noise, step, student.block_L)
            x = student_jump(student, codebook, x, labels, step, torch.full_like(step, split))
            fixture.compare(f"few{number}.seq.step{j}", x)
        chosen = plan.few_steps(layout.num_blocks, *t_list[1:], split=split)
        sampler = Sampler(layout, tokenizer, student)
        whole = run_plan(sampler, chosen, labels, noise, uniform)
        fixture.compare(f"few{number}.img", to_unit(tokenizer.to_image(whole)))


def segment(
    sampler: Sampler,
    chosen: plan.Plan,
    index: int,
    x_BLC: Tensor,
    cond: ClassCondition,
    noise_BLC: Tensor,
    uniform_BL: Tensor,
) -> Tensor:
    """One segment of a plan alone: codes `[B, L, C]` after it."""
    run = SegmentRun.begin(sampler, [(chosen, index)] * len(x_BLC), x_BLC, cond, noise_BLC, uniform_BL)
    while not run.done:
        run.advance()
    return run.codes()
