"""Stage (b): the AR teacher, cross entropy of the next token or of the next scale's tokens.

Shapes: B batch, L tokens, N images, V codebook size.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core import plan
from dd_core.models import build
from dd_core.models.build import AnyTeacher, AnyTokenizer
from dd_core.noise import stream_seed
from dd_core.runtime import mixed_precision
from dd_core.sampling import Sampler
from training import parallel
from training.data import text
from training.data.conditions import ClassConditions, Conditions
from training.metrics.preview import sample_grid
from training.optim.loop import Batches, Ema, Stage, one_cycle, plain
from training.optim.memory import economical
from training.optim.muon import MatrixOptimizer
from training.parallel import Figures
from training.recipes.settings import Recipe
from training.run import Run, begin_with, begun_from, keep_exports, load_tokenizer, refuse_given, train
from training.stages.mistakes import draw_choices, near_codes
from training.stages.tokens import read_tokens


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
        begin_with(recipe, first, model, "teacher")
    optimizer = MatrixOptimizer(model, lr=cfg.lr, matrix_lr=cfg.matrix_lr, weight_decay=cfg.weight_decay)
    ema = Ema(model, cfg.ema)
    tokens = tokens_FNL.flatten(0, 1)
    labels = labels_N.repeat(len(tokens_FNL))
    batches = Batches(len(tokens), cfg.batch, recipe.seed)
    parts = parallel.parts(batches.count, recipe.accumulate, "teacher.batch")
    economical(recipe, model.blocks)
    near = near_codes(tokenizer.codebook_VC) if cfg.replaced else None

    def update(step: int) -> dict[str, Tensor]:
        chosen = batches.at(step)
        dropped = torch.rand(len(chosen)) < cfg.class_dropout
        picked = conditions.pick(labels[chosen])
        choices = None if near is None else draw_choices(len(chosen), tokens.shape[1], near, cfg.replaced)
        figures = Figures(device, "cross_entropy")
        for part in parts:
            read = target = tokens[chosen[part.rows]].long().to(device)
            if near is not None and choices is not None:
                read, target = tokenizer.with_mistakes(target, near, choices[part.rows].to(device))
            cond = conditions.of(picked[part.rows]).to(device)
            cond = model.null_like(cond).where(dropped[part.rows].to(device), cond)
            with mixed_precision(device):
                logits = model(read, cond)
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
        draw = recipe.pairs.draw_settings
        sampler = Sampler(
            recipe.model.layout, tokenizer, None, averaged.eval(), draw=draw, device=device, exact=False
        )
        sample_grid(sampler, plan.teacher(recipe.model.layout.num_blocks), path, conditions)

    config = {"model": asdict(recipe.model), "teacher": asdict(cfg), "seed": recipe.seed}
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
    return Stage("teacher", cfg.steps, state, update, batches, preview, plain(config)), ema


def run(run: Run) -> None:
    """Stage (b).

    Raises:
        RecipeError: the folder was given a teacher, or an earlier stage is missing.
    """
    refuse_given(run, "teacher")
    recipe = run.recipe
    with parallel.in_turn():
        tokenizer = load_tokenizer(run)
        tokens, labels = read_tokens(run, tokenizer)
        conditions = (
            None if recipe.text is None else text.train_conditions(recipe, run.out / "captions.safetensors")
        )
        first = begun_from(run).sampler.teacher if recipe.begin_from else None
    assert first is None or isinstance(first, AnyTeacher)
    stage, ema = teacher_stage(recipe, tokens, labels, tokenizer, run.device, conditions, first)
    shape = build.new_teacher(recipe.model, tokenizer)
    train(run, stage, ema, shape, keep_exports(run, "teacher", ema, shape))
