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
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.cache import KVCache
from dd_core.codebook import lookup, nearest
from dd_core.condition import Condition, TextCondition, joined, on_device, padded, rows
from dd_core.errors import InvalidPlanError, InvalidRequestError
from dd_core.exact import alike, each
from dd_core.flow import FlowSettings, flow_map
from dd_core.layout import TokenLayout, data_positions
from dd_core.logits import LogitSettings, guide, log_probabilities, multinomial
from dd_core.models.protocols import Student, Teacher, Tokenizer
from dd_core.noise import Key, batch_noise
from dd_core.plan import Draw, Plan
from dd_core.runtime import exact_rows


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
    draw: LogitSettings = field(default_factory=LogitSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exact: bool = True

    @cached_property
    def codebook_VC(self) -> Tensor:
        """The tokenizer's codes, normalised once."""
        return self.tokenizer.codebook_VC.detach()

    @cached_property
    def any_threads(self) -> bool:
        """Whether a picture's bytes are the same on one thread of the CPU as on all. Where they are not,
        each is decoded on one, whatever else there is to decode.
        """
        codes_VC = self.codebook_VC
        tokens = torch.arange(self.layout.num_tokens, device=codes_VC.device) % len(codes_VC)
        with torch.inference_mode():
            return alike(self.tokenizer.to_image, codes_VC[tokens][None])


def renoise(x_BLC: Tensor, noise_BLC: Tensor, step_B: Tensor, layout: TokenLayout) -> Tensor:
    """X_t = Concat(X[:t−1], X_1[t:]): tokens before each sample's step, its noise from there on."""
    return torch.where(data_positions(layout, step_B)[..., None], x_BLC, noise_BLC)


def student_jump(
    student: Student,
    codebook_VC: Tensor,
    x_BLC: Tensor,
    cond: Condition,
    step_B: Tensor,
    split: Tensor | int,
) -> Tensor:
    """F_θ(X_t, t) of Eq. 6: final codes `[B, L, C]` from any point of a trajectory.

    Tokens before each sample's step stay as they are. Of the others, those of blocks before
    `split` (`[B]`, or one for all) are codebook rows (argmax of the logits), the rest the embedding
    head's output. A token whose logits are not numbers becomes NaN, so that it shows in its picture.
    """
    split_B = torch.full_like(step_B, split) if isinstance(split, int) else split
    embeddings, logits = student.predict(x_BLC, cond, step_B)
    best, index = logits.max(-1)
    codes = lookup(codebook_VC, index) + (best - best)[..., None]
    predicted = torch.where(data_positions(student.layout, split_B)[..., None], codes, embeddings)
    return torch.where(data_positions(student.layout, step_B)[..., None], x_BLC, predicted)


def student_pass(
    sampler: Sampler,
    x_BLC: Tensor,
    cond: Condition,
    noise_BLC: Tensor,
    step_B: Tensor,
    split: Tensor | int,
) -> Tensor:
    """One jump of a batch whose samples may be at different steps of different plans."""
    assert sampler.student is not None, "run_plan checks that the plan's actors are there"
    x_BLC = renoise(x_BLC, noise_BLC, step_B, sampler.layout)
    return student_jump(sampler.student, sampler.codebook_VC, x_BLC, cond, step_B, split)


@dataclass
class TeacherRun:
    """A teacher segment under way for B images (Algorithms 1 and 4): `advance` draws one block.

    With `draw` "flow" a token is the image of its own noise under Eq. 4, else it is drawn with the
    image's own uniform numbers. The prefix is snapped to its nearest codes, stays so, and is read in one
    causal prefill: the condition is the teacher's true p(· | X[:t−1]).
    """

    sampler: Sampler
    draw: Draw
    noise_BLC: Tensor
    uniform_BL: Tensor
    tokens_BL: Tensor
    cond: Condition
    cache: KVCache
    step: int
    finite_B: Tensor
    padded: dict[int, Condition] = field(default_factory=dict)  # by the number of idle rows

    @classmethod
    def begin(
        cls,
        sampler: Sampler,
        draw: Draw,
        x_BLC: Tensor,
        cond: Condition,
        noise_BLC: Tensor,
        uniform_BL: Tensor,
        start: int,
    ) -> TeacherRun:
        """A run whose first block is `start`; blocks before it are `x`'s."""
        teacher = sampler.teacher
        assert teacher is not None, "run_plan checks that the plan's actors are there"
        final = slice(sampler.layout.starts[start])
        tokens_BL = torch.zeros(x_BLC.shape[:2], dtype=torch.long, device=x_BLC.device)
        tokens_BL[:, final] = nearest(sampler.codebook_VC, x_BLC[:, final])
        finite_B = x_BLC[:, final].isfinite().flatten(1).all(1)
        cond = joined(cond, teacher.null_like(cond)) if sampler.draw.guided else cond
        cache = teacher.new_cache(rows(cond))
        return cls(sampler, draw, noise_BLC, uniform_BL, tokens_BL, cond, cache, start, finite_B)

    def advance(self) -> None:
        """Draws the tokens of block `step` in one forward pass, and moves on."""
        sampler, layout = self.sampler, self.sampler.layout
        assert sampler.teacher is not None
        block = slice(layout.starts[self.step], layout.starts[self.step + 1])
        used, guided = rows(self.cond), sampler.draw.guided
        idle = _idle_images(used, block.stop - block.start) if sampler.exact else 0
        if idle not in self.padded:
            self.padded[idle] = padded(self.cond, idle)
        seen = torch.cat([self.tokens_BL, self.tokens_BL]) if guided else self.tokens_BL
        seen = F.pad(seen, (0, 0, 0, idle))
        logits = sampler.teacher.block_logits(seen, self.padded[idle], self.step, self.cache)[:used]
        if guided:
            logits = guide(logits, sampler.draw.scale(self.step, layout.num_blocks))
        self.finite_B = self.finite_B & logits.isfinite().flatten(1).all(1)
        log_p = log_probabilities(logits, sampler.draw)
        if self.draw == "flow":
            drawn = _exact_flow_map(sampler, self.noise_BLC[:, block], log_p)
        else:
            drawn = multinomial(log_p, self.uniform_BL[:, block])
        self.tokens_BL[:, block] = drawn
        self.step += 1

    def codes(self, x_BLC: Tensor) -> Tensor:
        """`x` with the tokens so far in place; NaN where the teacher's logits were not numbers."""
        stop = self.sampler.layout.starts[self.step]
        x = x_BLC.clone()
        x[:, :stop] = lookup(self.sampler.codebook_VC, self.tokens_BL[:, :stop])
        return torch.where(self.finite_B[:, None, None], x, torch.nan)


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
    """The teacher draws blocks `start..stop-1` given what comes before (Algorithms 1 and 4)."""
    run = TeacherRun.begin(sampler, plan.draw, x_BLC, cond, noise_BLC, uniform_BL, start)
    for _ in range(start, stop):
        run.advance()
    return run.codes(x_BLC)


def _idle_images(used: int, tokens: int) -> int:
    """How many images of `tokens` each to add so that no rounding depends on how many there are.

    At least two go together: a convolution of one is another kernel (VAR's teacher reads f̂).
    """
    enough = (n for n in count(max(used, 2)) if exact_rows(n * tokens) == n * tokens)
    return next(enough) - used


def _exact_flow_map(sampler: Sampler, noise_BSC: Tensor, log_p_BSV: Tensor) -> Tensor:
    """Eq. 4 for the tokens of a block, `[B, S]`; idle rows for the same reason as in the models."""
    used = log_p_BSV.shape[0] * log_p_BSV.shape[1]
    idle = exact_rows(used) - used if sampler.exact else 0
    noise, log_p = (F.pad(t.flatten(0, 1), (0, 0, 0, idle)) for t in (noise_BSC, log_p_BSV))
    return flow_map(noise, log_p, sampler.codebook_VC, sampler.flow)[:used].view(log_p_BSV.shape[:2])


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
    check_plan(sampler, plan)
    x = noise_BLC
    for segment in plan.segments:
        if segment.actor == "teacher":
            x = teacher_steps(sampler, plan, x, cond, noise_BLC, uniform_BL, segment.start, segment.stop)
        elif segment.actor == "student":
            step_B = torch.full((len(x),), segment.start, device=x.device)
            x = student_pass(sampler, x, cond, noise_BLC, step_B, plan.first_continuous)
        else:
            x = marginal_draw(sampler, x, cond, uniform_BL, segment.start, segment.stop)
    return x


def check_plan(sampler: Sampler, plan: Plan) -> None:
    """Whether `sampler` can run `plan`.

    Raises:
        InvalidPlanError: the plan is for another layout, or an actor that it needs is missing.
    """
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
    sampler: Sampler, plan: Plan, cond: Sequence[int] | Condition, keys: Sequence[Key]
) -> Tensor:
    """Final codes `[B, L, C]` on the sampler's device: one row for each condition and (seed, index) key.

    Args:
        cond: class indices, or texts (`TextEncoder.encode`).

    Raises:
        InvalidRequestError: not as many conditions as keys, or of another kind than the model's.
        InvalidPlanError: see `run_plan`.
    """
    if not isinstance(cond, Tensor | TextCondition):
        cond = torch.tensor(cond, dtype=torch.long)
    if rows(cond) != len(keys):
        raise InvalidRequestError(f"{rows(cond)} conditions for {len(keys)} images", param="condition")
    noise, uniform = batch_noise(keys, sampler.layout.num_tokens, sampler.codebook_VC.shape[1])
    noise, uniform = (t.to(sampler.device, non_blocking=True) for t in (noise, uniform))
    return run_plan(sampler, plan, on_device(cond, sampler.device), noise, uniform)


def decode(sampler: Sampler, codes_BLC: Tensor) -> tuple[Tensor, Tensor]:
    """Final codes → images `[B, H, W, 3]` uint8, and whether each is a picture: `[B]`, False where
    something on the way was not a number.
    """
    image_B3HW = to_images(sampler, codes_BLC)
    return to_pixels(image_B3HW), image_B3HW.isfinite().flatten(1).all(1)


def to_images(sampler: Sampler, codes_BLC: Tensor) -> Tensor:
    """Final codes → images `[B, 3, H, W]` in [-1, 1], as the decoder makes them (unclamped).

    If bytes are to be exact each is decoded alone; on a CPU on one thread each, but for a few, which would
    leave threads idle.
    """
    to_image = sampler.tokenizer.to_image
    if not sampler.exact:
        return to_image(codes_BLC)
    lanes = torch.split(codes_BLC, 1)
    few = 2 * len(lanes) <= torch.get_num_threads()
    if codes_BLC.device.type == "cuda" or (few and sampler.any_threads):
        return torch.cat([to_image(lane) for lane in lanes])
    return torch.cat(each(to_image, lanes))


@torch.inference_mode()
def sample_images(
    sampler: Sampler, plan: Plan, cond: Sequence[int] | Condition, keys: Sequence[Key]
) -> Tensor:
    """Images `[B, H, W, 3]` uint8 on the CPU: one for each condition and (seed, index) key.

    An image depends on its own condition, key and plan; not on the others in the batch.
    """
    return decode(sampler, sample_codes(sampler, plan, cond, keys))[0].cpu()
