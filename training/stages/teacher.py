"""Stage (b): the AR teacher, cross entropy of the next token or of the next scale's tokens.

Shapes: B batch, L tokens, N images, V codebook size.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core import plan
from dd_core.logits import LogitSettings
from dd_core.models import build
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer
from dd_core.models.layers import carry_over
from dd_core.noise import stream_seed
from dd_core.runtime import mixed_precision
from dd_core.sampling import Sampler, sample_codes
from training import parallel
from training.data.conditions import ClassConditions, Conditions, spread
from training.metrics.plots import image_grid
from training.optim.loop import Batches, Ema, Stage, one_cycle, plain, update_at
from training.optim.memory import economical
from training.optim.muon import Muon
from training.parallel import Figures
from training.recipes.settings import Recipe


class MatrixOptimizer:
    """Muon for the blocks' matrices and AdamW for everything else, as one optimizer.

    Muon orthogonalises the momentum of a matrix; on small transformers it reaches a loss in
    well under the steps that AdamW needs.
    """

    def __init__(
        self, model: AnyStudent | AnyTeacher, *, lr: float, matrix_lr: float, weight_decay: float
    ) -> None:
        inside = [p for p in model.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in inside}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.matrices = Muon([{"params": inside, "peak": matrix_lr}], matrix_lr, weight_decay=weight_decay)
        self.others = torch.optim.AdamW(
            [{"params": rest, "peak": lr}], lr=lr, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, factor: float) -> None:
        """One update at `factor` of the peak learning rates."""
        for optimizer in (self.matrices, self.others):
            update_at(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        return {"matrices": self.matrices.state_dict(), "others": self.others.state_dict()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.matrices.load_state_dict(state["matrices"])
        self.others.load_state_dict(state["others"])


def new_teacher(recipe: Recipe, tokenizer: AnyTokenizer, device: torch.device) -> AnyTeacher:
    """A freshly initialised teacher, the same for the same seed on every device."""
    torch.manual_seed(stream_seed(recipe.seed, 0, "teacher-init"))
    return build.new_teacher(recipe.model, tokenizer).to(device)


def teacher_stage(
    recipe: Recipe,
    tokens_FNL: Tensor,
    labels_N: Tensor,
    tokenizer: AnyTokenizer,
    device: torch.device,
    conditions: Conditions | None = None,
    first: AnyTeacher | None = None,
) -> tuple[Stage, Ema]:
    """The stage, and the average whose weights are the result.

    Args:
        tokens_FNL: codes of all images and of their mirror images, `[2, N, L]`.
        conditions: what the labels stand for; None = classes.
        first: a teacher of other conditions; all of it that fits is carried over.
    """
    conditions = conditions or ClassConditions(recipe.model.num_classes)
    cfg = recipe.teacher
    model = new_teacher(recipe, tokenizer, device)
    if first is not None:
        carry_over(first, model)
    optimizer = MatrixOptimizer(model, lr=cfg.lr, matrix_lr=cfg.matrix_lr, weight_decay=cfg.weight_decay)
    ema = Ema(model, cfg.ema)
    tokens = tokens_FNL.flatten(0, 1)
    labels = labels_N.repeat(len(tokens_FNL))
    batches = Batches(len(tokens), cfg.batch, recipe.seed)
    parts = parallel.parts(batches.count, recipe.accumulate, "teacher.batch")
    economical(recipe, model.blocks)

    def update(step: int) -> dict[str, Tensor]:
        chosen = batches.at(step)
        dropped = torch.rand(len(chosen)) < cfg.class_dropout
        picked = conditions.pick(labels[chosen])
        figures = Figures(device, "cross_entropy")
        for part in parts:
            target = tokens[chosen[part.rows]].long().to(device)
            cond = conditions.of(picked[part.rows]).to(device)
            cond = model.null_like(cond).where(dropped[part.rows].to(device), cond)
            with mixed_precision(device):
                logits = model(target, cond)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
            loss = loss * (len(target) / len(chosen))
            loss.backward()  # type: ignore[no-untyped-call]
            figures.add(cross_entropy=loss)
        parallel.sum_gradients(model.parameters())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(one_cycle(step, cfg.steps, 1.0))
        ema.update(model)
        return {**figures.total(), "gradient_norm": norm}

    def preview(path: Path) -> None:
        averaged = new_teacher(recipe, tokenizer, device)
        averaged.load_state_dict(ema.average)
        draw = replace(draw_settings(recipe), guidance=max(1.0, recipe.pairs.guidance))
        sampler = Sampler(
            recipe.model.layout, tokenizer, None, averaged.eval(), draw=draw, device=device, exact=False
        )
        sample_grid(sampler, plan.teacher(recipe.model.layout.num_blocks), path, conditions)

    config = {"model": asdict(recipe.model), "teacher": asdict(cfg), "seed": recipe.seed}
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
    return Stage("teacher", cfg.steps, state, update, batches, preview, plain(config)), ema


def draw_settings(recipe: Recipe) -> LogitSettings:
    """The teacher's distribution as the recipe's pairs are drawn from it."""
    p = recipe.pairs
    return LogitSettings(
        guidance=p.guidance,
        guidance_schedule=p.guidance_schedule,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
    )


@torch.inference_mode()
def sample_grid(
    sampler: Sampler, chosen: plan.Plan, path: Path, conditions: Conditions, rows: int = 4
) -> None:
    """A picture of `rows` samples (seed 0, indices 0, 1, …) of each class, a column a class.

    Of more than ten labels, some that are spread over all.
    """
    columns = min(10, conditions.count)
    labels = torch.tensor(spread(conditions.count, rows * columns))
    codes = sample_codes(sampler, chosen, conditions(labels), [(0, i) for i in range(len(labels))])
    image_grid(sampler.tokenizer.to_image(codes), path, columns=columns)
