"""The one loop that runs every plan, and the segments that it runs.

    noise ─▶ renoise ─▶ student jump │ teacher steps │ marginal draw ─▶ next segment ─▶ codes ─▶ images

All state is arguments. Inside a sample there is no host synchronisation, no branch on data and
no shape that depends on data: the steps of a plan are Python integers, so the whole plan can
be captured as one CUDA graph.

Shapes: B batch, L tokens, C code dimension, V codebook size, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import assert_never

import torch
from torch import Tensor

from dd_core.codebook import lookup, nearest
from dd_core.condition import ClassCondition, Condition, as_condition, of_kind
from dd_core.errors import InvalidPlanError, InvalidRequestError, NotANumberError
from dd_core.exact import (
    ImageByImage,
    among_idle_rows,
    exact_block_logits,
    exact_tokens,
    with_idle_sequences,
)
from dd_core.flow import FlowSettings, flow_map
from dd_core.layout import TokenLayout, data_positions
from dd_core.logits import LogitSettings, guide, log_probabilities, multinomial
from dd_core.models.protocols import ALL_TOKENS, BlockByBlock, Jump, Pictures
from dd_core.noise import Key, batch_noise
from dd_core.plan import Plan, Segment


@dataclass(frozen=True)
class Sampler:
    """The models and settings that plans run on.

    Args:
        student, teacher: None where the bundle has none; plans that need it are refused.
        marginals_KLV: log-frequencies of each token at each place for each class (the optimum
            of Proposition 3.1), for the baselines.
        draw: how the teacher's logits become probabilities, as the student was distilled.
        flow: solver of the noise-to-token map, for trajectory plans.
        exact: an image has the same bytes alone and in any batch (`dd_core.exact`). Costs padding of
            small teacher batches and decoding image by image; evaluation switches it off.
    """

    layout: TokenLayout
    tokenizer: Pictures
    student: Jump | None = None
    teacher: BlockByBlock | None = None
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
    def to_images(self) -> Callable[[Tensor], Tensor]:
        """The decoder: final codes → images `[B, 3, H, W]` in [−1, 1], not clamped."""
        if self.exact:
            return ImageByImage(self.tokenizer, self.layout.num_tokens)
        return self.tokenizer.to_image


def run_plan(sampler: Sampler, plan: Plan, cond: Condition, noise_BLC: Tensor, uniform_BL: Tensor) -> Tensor:
    """Run a plan: noise → final codes `[B, L, C]` (Algorithms 1, 3 and 4 and the baselines).

    Args:
        noise_BLC: the images' noise, standard normal; the same tensor serves every segment.
        uniform_BL: the images' numbers in (0, 1) for multinomial draws.

    Raises:
        InvalidPlanError: the plan is for another layout, or an actor that it needs is missing.
        InvalidRequestError: the models read another kind of condition.
    """
    check_plan(sampler, plan)
    x_BLC = noise_BLC
    for index in range(len(plan.segments)):
        at = [(plan, index)] * len(x_BLC)
        run = SegmentRun.begin(sampler, at, x_BLC, cond, noise_BLC, uniform_BL)
        while not run.done:
            run.advance()
        x_BLC = run.codes()
    return x_BLC


def renoise(x_BLC: Tensor, noise_BLC: Tensor, step_B: Tensor, block_L: Tensor) -> Tensor:
    """X_t = Concat(X[:t−1], X_1[t:]): tokens before each sample's step, its noise from there on."""
    return torch.where(data_positions(block_L, step_B)[..., None], x_BLC, noise_BLC)


def student_jump(
    student: Jump,
    codebook_VC: Tensor,
    x_BLC: Tensor,
    cond: Condition,
    step_B: Tensor,
    split_B: Tensor,
    chosen: slice = ALL_TOKENS,
) -> Tensor:
    """F_θ(X_t, t) of Eq. 6: final codes `[B, L, C]` from any point of a trajectory.

    Tokens before each sample's step stay as they are. Of the others, those of blocks before
    `split` are codebook rows (argmax of the logits), the rest the embedding head's output.
    A token whose logits are not numbers becomes NaN, so that it shows in its picture.

    Args:
        chosen: tokens that the logits head is computed for: at least those between any sample's step and its
            split.
    """
    embeddings, logits = student.predict(x_BLC, cond, step_B, chosen)
    best, index = logits.max(-1)
    codes = lookup(codebook_VC, index) + (best - best)[..., None]
    first, stop, _ = chosen.indices(embeddings.shape[1])
    is_code = data_positions(student.block_L, split_B)[:, chosen, None]
    middle = torch.where(is_code, codes, embeddings[:, chosen])
    predicted = torch.cat([embeddings[:, :first], middle, embeddings[:, stop:]], 1)
    return torch.where(data_positions(student.block_L, step_B)[..., None], x_BLC, predicted)


def chosen_tokens(layout: TokenLayout, steps: Sequence[int], splits: Sequence[int]) -> slice:
    """The tokens that a jump of images at `steps` needs logits for, in numbers that keep bytes."""
    starts = layout.starts
    return exact_tokens(starts[min(steps)], starts[max(*steps, *splits)], layout.num_tokens)


def marginal_draw(
    marginals_KLV: Tensor,
    codebook_VC: Tensor,
    x_BLC: Tensor,
    cond: Condition,
    uniform_BL: Tensor,
    tokens: slice,
) -> Tensor:
    """`x` with codes of `tokens` drawn independently from each token's frequency (Proposition 3.1)."""
    labels_B = of_kind(cond, ClassCondition).labels_B
    x_BLC = x_BLC.clone()
    drawn = multinomial(marginals_KLV[labels_B, tokens].float(), uniform_BL[:, tokens])
    x_BLC[:, tokens] = lookup(codebook_VC, drawn)
    return x_BLC


class SegmentRun(ABC):
    """One segment under way for a batch of images: `begin`, then `advance` until `done`, then `codes`.

    An advance is one forward pass: a student's segment takes one, a teacher's one a block, a marginal's one
    without a model. `run_plan` takes all advances in turn; the server, those of other batches in between.
    """

    done: bool = False

    @staticmethod
    def begin(
        sampler: Sampler,
        at: Sequence[tuple[Plan, int]],
        x_BLC: Tensor,
        cond: Condition,
        noise_BLC: Tensor,
        uniform_BL: Tensor,
    ) -> SegmentRun:
        """A run of which nothing is computed yet. The plans have passed `check_plan`.

        Args:
            at: each image's plan, and the index of its segment there. Student segments of several plans may
                share a run; a teacher's or a marginal's images are all at the same segment of one plan.
            x_BLC: the images as the segment before left them; their noise where it is the first.
        """
        plan, segment = at[0][0], at[0][0].segments[at[0][1]]
        if segment.actor == "student":
            assert sampler.student is not None
            steps, splits = [p.segments[i].start for p, i in at], [p.first_continuous for p, _ in at]
            chosen = chosen_tokens(sampler.layout, steps, splits)
            step_B, split_B = _per_image(steps, x_BLC.device), _per_image(splits, x_BLC.device)
            x_BLC = renoise(x_BLC, noise_BLC, step_B, sampler.student.block_L)
            models = sampler.student, sampler.codebook_VC
            jump = partial(student_jump, *models, cond=cond, step_B=step_B, split_B=split_B, chosen=chosen)
            return _OnePass(x_BLC, jump)
        assert at.count(at[0]) == len(at), "only student segments of several plans share a run"
        if segment.actor == "teacher":
            return TeacherRun(sampler, plan, segment, x_BLC, cond, noise_BLC, uniform_BL)
        if segment.actor == "marginal":
            assert sampler.marginals_KLV is not None
            tokens = slice(sampler.layout.starts[segment.start], sampler.layout.starts[segment.stop])
            tables = sampler.marginals_KLV, sampler.codebook_VC
            draw = partial(marginal_draw, *tables, cond=cond, uniform_BL=uniform_BL, tokens=tokens)
            return _OnePass(x_BLC, draw)
        assert_never(segment.actor)

    @abstractmethod
    def advance(self) -> None:
        """Compute one forward pass."""

    @abstractmethod
    def codes(self) -> Tensor:
        """The images after what was computed so far, `[B, L, C]`."""


class _OnePass(SegmentRun):
    """A segment that is one function of `x`: a student's jump, or the draw from marginals."""

    def __init__(self, x_BLC: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        self._x_BLC, self._function = x_BLC, function

    def advance(self) -> None:
        self._x_BLC = self._function(self._x_BLC)
        self.done = True

    def codes(self) -> Tensor:
        return self._x_BLC


class TeacherRun(SegmentRun):
    """A teacher segment, of which an advance draws one block (Algorithms 1 and 4).

    With the plan's `draw` "flow" a token is the image of its own noise under Eq. 4, else it is drawn with
    the image's own uniform numbers. The prefix is snapped to its nearest codes, stays so, and is read in one
    causal prefill: the condition is the teacher's true p(· | X[:t−1]).

    All that a block changes lies in tensors of the run, which keep their memory: a graph may hold them.

    Args:
        x_BLC, cond, noise_BLC, uniform_BL: as `SegmentRun.begin` has them; the run keeps them.
    """

    def __init__(
        self,
        sampler: Sampler,
        plan: Plan,
        segment: Segment,
        x_BLC: Tensor,
        cond: Condition,
        noise_BLC: Tensor,
        uniform_BL: Tensor,
    ) -> None:
        assert sampler.teacher is not None
        self._sampler, self._teacher, self._draw = sampler, sampler.teacher, plan.draw
        self._noise_BLC, self._uniform_BL = noise_BLC, uniform_BL
        self._sizes = sampler.layout.block_sizes[segment.start : segment.stop]
        self._start, self._stop = segment.start, segment.stop
        self._tokens_BL = torch.zeros(x_BLC.shape[:2], dtype=torch.long, device=x_BLC.device)
        self._finite_B = torch.ones(len(x_BLC), dtype=torch.bool, device=x_BLC.device)
        self._cond = self._both(cond)
        self.cache = self._teacher.new_cache(len(cond) * (2 if sampler.draw.guided else 1))
        self._begin(x_BLC)

    def restart(self, x_BLC: Tensor, cond: Condition, noise_BLC: Tensor, uniform_BL: Tensor) -> None:
        """Begin again with as many other images, on the same memory."""
        self._noise_BLC.copy_(noise_BLC)
        self._uniform_BL.copy_(uniform_BL)
        self._cond.write(self._both(cond))
        self._begin(x_BLC)

    def _begin(self, x_BLC: Tensor) -> None:
        self.step, self.done, self.cache.length = self._start, False, 0
        prefix = slice(self._sampler.layout.starts[self._start])
        self._tokens_BL[:, prefix] = nearest(self._sampler.codebook_VC, x_BLC[:, prefix])
        self._finite_B.copy_(x_BLC[:, prefix].isfinite().flatten(1).all(1))

    def _both(self, cond: Condition) -> Condition:
        """With the condition that stands for none where there is guidance, and idle rows in exact mode."""
        cond = cond.joined(self._teacher.null_like(cond)) if self._sampler.draw.guided else cond
        return with_idle_sequences(cond, self._sizes) if self._sampler.exact else cond

    def advance(self) -> None:
        self.compute(self.step)
        self.count()

    def count(self) -> None:
        """Count the block `step` as drawn."""
        self.step += 1
        self.done = self.step == self._stop

    def compute(self, step: int) -> None:
        """Draw the block `step`, which is next; once more with the cache's former length, it is the same."""
        sampler, starts = self._sampler, self._sampler.layout.starts
        block = slice(starts[step], starts[step + 1])
        logits = self._guided_logits(step)
        self._finite_B.logical_and_(logits.isfinite().flatten(1).all(1))
        log_p = log_probabilities(logits, sampler.draw)
        if self._draw == "flow":
            self._tokens_BL[:, block] = _flow_tokens(sampler, self._noise_BLC[:, block], log_p)
        else:
            self._tokens_BL[:, block] = multinomial(log_p, self._uniform_BL[:, block])

    def codes(self) -> Tensor:
        """X_t: the tokens so far, then noise. All of it is NaN where the teacher's logits were no numbers."""
        final = slice(self._sampler.layout.starts[self.step])
        x_BLC = self._noise_BLC.clone()
        x_BLC[:, final] = lookup(self._sampler.codebook_VC, self._tokens_BL[:, final])
        return torch.where(self._finite_B[:, None, None], x_BLC, torch.nan)

    def _guided_logits(self, step: int) -> Tensor:
        """Logits of the block `step`, `[B, block size, V]`."""
        draw, layout = self._sampler.draw, self._sampler.layout
        seen = torch.cat([self._tokens_BL, self._tokens_BL]) if draw.guided else self._tokens_BL
        if self._sampler.exact:
            logits = exact_block_logits(self._teacher, seen, self._cond, step, self.cache)
        else:
            logits = self._teacher.block_logits(seen, self._cond, step, self.cache)
        return guide(logits, draw.scale(step, layout.num_blocks)) if draw.guided else logits


def _flow_tokens(sampler: Sampler, noise_BSC: Tensor, log_p_BSV: Tensor) -> Tensor:
    """Eq. 4 for the tokens of a block, `[B, S]`."""
    carry = partial(flow_map, codebook_VC=sampler.codebook_VC, settings=sampler.flow)
    rows = noise_BSC.flatten(0, 1), log_p_BSV.flatten(0, 1)
    tokens = among_idle_rows(carry, *rows) if sampler.exact else carry(*rows)
    return tokens.view(log_p_BSV.shape[:2])


def _per_image(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`[B]`. A number that all share is not copied from the host, which no graph could capture."""
    if numbers.count(numbers[0]) == len(numbers):
        return torch.full((len(numbers),), numbers[0], device=device)
    return torch.tensor(numbers, device=device)


def check_plan(sampler: Sampler, plan: Plan) -> None:
    """Refuse a plan that `sampler` cannot run.

    Raises:
        InvalidPlanError: the plan is for another layout, or an actor that it needs is missing.
    """
    if plan.num_blocks != sampler.layout.num_blocks:
        raise InvalidPlanError(
            f"plan {plan.name} is for {plan.num_blocks} blocks, this model has {sampler.layout.num_blocks}",
            param="plan",
        )
    present = {"student": sampler.student, "teacher": sampler.teacher, "marginal": sampler.marginals_KLV}
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
    sampler: Sampler, plan: Plan, cond: Sequence[int] | Tensor | Condition, keys: Sequence[Key]
) -> Tensor:
    """Final codes `[B, L, C]` on the sampler's device: one row for each condition and (seed, index) key.

    Args:
        cond: class indices, or texts (`PromptEncoder.encode`).

    Raises:
        InvalidRequestError: not as many conditions as keys, or of another kind than the model's.
        InvalidPlanError: see `run_plan`.
    """
    cond = as_condition(cond)
    if len(cond) != len(keys):
        raise InvalidRequestError(f"{len(cond)} conditions for {len(keys)} images", param="condition")
    noise, uniform = batch_noise(keys, sampler.layout, sampler.codebook_VC.shape[1])
    noise, uniform = (t.to(sampler.device, non_blocking=True) for t in (noise, uniform))
    return run_plan(sampler, plan, cond.to(sampler.device), noise, uniform)


def decode(sampler: Sampler, codes_BLC: Tensor) -> tuple[Tensor, Tensor]:
    """Final codes → images `[B, H, W, 3]` uint8, and a mask `[B]`: False where something on the way was not
    a number, so that it is no picture.
    """
    image_B3HW = sampler.to_images(codes_BLC)
    return to_pixels(image_B3HW), image_B3HW.isfinite().flatten(1).all(1)


@torch.inference_mode()
def sample_images(
    sampler: Sampler, plan: Plan, cond: Sequence[int] | Tensor | Condition, keys: Sequence[Key]
) -> Tensor:
    """Images `[B, H, W, 3]` uint8 on the CPU: one for each condition and (seed, index) key.

    An image depends on its own condition, key and plan; not on the others in the batch.

    Raises:
        NotANumberError: one of them is no picture.
        InvalidRequestError, InvalidPlanError: as `sample_codes` does.
    """
    pixels, good = decode(sampler, sample_codes(sampler, plan, cond, keys))
    if not good.all():
        raise NotANumberError("the model's output is not a number")
    return pixels.cpu()
