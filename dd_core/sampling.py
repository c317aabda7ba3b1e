"""The one loop that runs every plan, and what the segments do.

    noise ─▶ renoise ─▶ student jump │ teacher steps │ marginal draw ─▶ next segment ─▶ codes

All state is arguments. Inside a sample there is no host synchronisation, no branch on data and
no shape that depends on data: the steps of a plan are Python integers, so the whole plan can
be captured as one CUDA graph.

Shapes: B batch, L tokens, C code dimension, V codebook size, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.codebook import lookup, nearest
from dd_core.condition import Condition, joined, padded, rows
from dd_core.draw import DrawSettings, guide, log_probabilities, multinomial
from dd_core.errors import InvalidPlanError
from dd_core.flow import FlowSettings, flow_map
from dd_core.layout import TokenLayout, data_positions
from dd_core.models.protocols import Student, Teacher, Tokenizer
from dd_core.noise import batch_noise
from dd_core.plan import Plan
from dd_core.runtime import EXACT_ROWS


@dataclass(frozen=True)
class Sampler:
    """The models and settings that plans run on.

    Args:
        student, teacher: None where the bundle has none; plans that need it are refused.
        marginals_KLV: log-frequencies of each token at each place for each class (the optimum
            of Proposition 3.1), for the baselines.
        draw: how the teacher's logits become probabilities, as the student was distilled.
        flow: solver of the noise-to-token map, for trajectory plans.
        exact: an image has the same bytes alone and in any batch. Costs padding of small teacher
            batches and decoding image by image (convolutions round differently by batch);
            evaluation switches it off.
    """

    layout: TokenLayout
    tokenizer: Tokenizer
    student: Student | None = None
    teacher: Teacher | None = None
    marginals_KLV: Tensor | None = None
    draw: DrawSettings = field(default_factory=DrawSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exact: bool = True

    @cached_property
    def codebook_VC(self) -> Tensor:
        """The tokenizer's codes, normalised once."""
        return self.tokenizer.codebook_VC.detach()


def renoise(x_BLC: Tensor, noise_BLC: Tensor, step_B: Tensor, layout: TokenLayout) -> Tensor:
    """X_t = Concat(X[:t−1], X_1[t:]): tokens before each sample's step, its noise from there on."""
    return torch.where(data_positions(layout, step_B)[..., None], x_BLC, noise_BLC)


def student_jump(
    student: Student, codebook_VC: Tensor, x_BLC: Tensor, cond: Condition, step_B: Tensor, split: int
) -> Tensor:
    """F_θ(X_t, t) of Eq. 6: final codes `[B, L, C]` from any point of a trajectory.

    Tokens before each sample's step stay as they are. Of the others, those of blocks before
    `split` are codebook rows (argmax of the logits), the rest the embedding head's output.
    """
    embeddings, logits = student.predict(x_BLC, cond, step_B)
    first_continuous = student.layout.starts[split]
    codes = lookup(codebook_VC, logits[:, :first_continuous].argmax(-1))
    predicted = torch.cat([codes, embeddings[:, first_continuous:]], 1)
    return torch.where(data_positions(student.layout, step_B)[..., None], x_BLC, predicted)


def teacher_steps(
    sampler: Sampler,
    plan: Plan,
    x_BLC: Tensor,
    cond: Condition,
    noise_BLC: Tensor,
    uniform_BL: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    """The teacher draws blocks `start..stop-1` given what comes before (Algorithms 1 and 4).

    With `plan.draw == "flow"` a token is the image of its own noise under Eq. 4, else it is drawn
    with the image's own uniform numbers. The prefix is snapped to its nearest codes, stays so, and is
    read in one causal prefill: the condition is the teacher's true p(· | X[:t−1]).
    """
    teacher = sampler.teacher
    assert teacher is not None, "run_plan checks that the plan's actors are there"
    codebook, starts = sampler.codebook_VC, sampler.layout.starts
    guided = sampler.draw.guided
    cond = joined(cond, teacher.null_like(cond)) if guided else cond
    used = rows(cond)
    idle = max(0, EXACT_ROWS - used) if sampler.exact else 0
    cond = padded(cond, idle)
    cache = teacher.new_cache(used + idle)
    tokens_BL = torch.zeros(x_BLC.shape[:2], dtype=torch.long, device=x_BLC.device)
    tokens_BL[:, : starts[start]] = nearest(codebook, x_BLC[:, : starts[start]])
    for step in range(start, stop):
        block = slice(starts[step], starts[step + 1])
        seen = F.pad(torch.cat([tokens_BL, tokens_BL]) if guided else tokens_BL, (0, 0, 0, idle))
        logits = teacher.block_logits(seen, cond, step, cache)[:used]
        if guided:
            logits = guide(logits, sampler.draw.scale(step, plan.num_blocks))
        log_p = log_probabilities(logits, sampler.draw)
        if plan.draw == "flow":
            tokens_BL[:, block] = _exact_flow_map(sampler, noise_BLC[:, block], log_p)
        else:
            tokens_BL[:, block] = multinomial(log_p, uniform_BL[:, block])
    x = x_BLC.clone()
    x[:, : starts[stop]] = lookup(codebook, tokens_BL[:, : starts[stop]])
    return x


def _exact_flow_map(sampler: Sampler, noise_BSC: Tensor, log_p_BSV: Tensor) -> Tensor:
    """Eq. 4 for the tokens of a block, `[B, S]`; idle rows for the same reason as in the models."""
    count = log_p_BSV.shape[0] * log_p_BSV.shape[1]
    idle = max(0, EXACT_ROWS - count) if sampler.exact else 0
    noise, log_p = (F.pad(t.flatten(0, 1), (0, 0, 0, idle)) for t in (noise_BSC, log_p_BSV))
    return flow_map(noise, log_p, sampler.codebook_VC, sampler.flow)[:count].view(log_p_BSV.shape[:2])


def marginal_draw(
    sampler: Sampler, x_BLC: Tensor, cond: Condition, uniform_BL: Tensor, start: int, stop: int
) -> Tensor:
    """Every token of blocks `start..stop-1` drawn independently from its frequency."""
    assert sampler.marginals_KLV is not None, "run_plan checks that the plan's actors are there"
    assert isinstance(cond, Tensor), "frequencies are of classes"
    place = slice(sampler.layout.starts[start], sampler.layout.starts[stop])
    tokens = multinomial(sampler.marginals_KLV[cond, place].float(), uniform_BL[:, place])
    x = x_BLC.clone()
    x[:, place] = lookup(sampler.codebook_VC, tokens)
    return x


def run_plan(sampler: Sampler, plan: Plan, cond: Condition, noise_BLC: Tensor, uniform_BL: Tensor) -> Tensor:
    """Runs a plan: noise → final codes `[B, L, C]` (Algorithms 1, 3 and 4 and the baselines).

    Args:
        cond: class indices `[B]`, or texts.
        noise_BLC: the images' noise, standard normal; the same tensor serves every segment.
        uniform_BL: the images' numbers in (0, 1) for multinomial draws.

    Raises:
        InvalidPlanError: the plan is for another layout, or an actor that it needs is missing.
    """
    _check(sampler, plan)
    codebook = sampler.codebook_VC
    split = plan.num_blocks if plan.split is None else plan.split
    x = noise_BLC
    for segment in plan.segments:
        step_B = torch.full((len(x),), segment.start, device=x.device)
        x = renoise(x, noise_BLC, step_B, sampler.layout)
        if segment.actor == "student":
            assert sampler.student is not None
            x = student_jump(sampler.student, codebook, x, cond, step_B, split)
        elif segment.actor == "teacher":
            x = teacher_steps(sampler, plan, x, cond, noise_BLC, uniform_BL, segment.start, segment.stop)
        else:
            x = marginal_draw(sampler, x, cond, uniform_BL, segment.start, segment.stop)
    return x


def _check(sampler: Sampler, plan: Plan) -> None:
    if plan.num_blocks != sampler.layout.num_blocks:
        raise InvalidPlanError(
            f"plan {plan.name} is for {plan.num_blocks} blocks, this model has {sampler.layout.num_blocks}",
            param="plan",
        )
    present = {
        "student": sampler.student,
        "teacher": sampler.teacher,
        "marginal": sampler.marginals_KLV,
    }
    missing = sorted(actor for actor in plan.needs if present[actor] is None)
    if missing:
        raise InvalidPlanError(
            f"plan {plan.name} needs a {missing[0]}, which this bundle lacks", param="plan"
        )


def to_pixels(image_B3HW: Tensor) -> Tensor:
    """Images in [−1, 1] → `[B, H, W, 3]` uint8: rounded to nearest, clamped."""
    scaled = image_B3HW.float().add(1.0).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def sample_codes(
    sampler: Sampler, plan: Plan, labels: Sequence[int], keys: Sequence[tuple[int, int]]
) -> Tensor:
    """Final codes `[B, L, C]` on the sampler's device: one row for each label and (seed, index) key."""
    noise, uniform = batch_noise(list(keys), sampler.layout.num_tokens, sampler.codebook_VC.shape[1])
    cond = torch.tensor(labels, dtype=torch.long)
    cond, noise, uniform = (t.to(sampler.device, non_blocking=True) for t in (cond, noise, uniform))
    return run_plan(sampler, plan, cond, noise, uniform)


@torch.inference_mode()
def sample_images(
    sampler: Sampler, plan: Plan, labels: Sequence[int], keys: Sequence[tuple[int, int]]
) -> Tensor:
    """Images `[B, H, W, 3]` uint8 on the CPU: one for each label and (seed, index) key.

    An image depends on its own label, key and plan; not on the others in the batch.
    """
    codes = sample_codes(sampler, plan, labels, keys)
    lanes = torch.split(codes, 1) if sampler.exact else (codes,)
    return to_pixels(torch.cat([sampler.tokenizer.to_image(lane) for lane in lanes])).cpu()
