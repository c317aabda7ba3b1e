"""Stage (d): distillation by Algorithm 2.

    pair (noise, tokens), t ~ {t_k} ─▶ X_t = renoise(tokens, noise, t) ─▶ F_θ ─▶ losses at positions ≥ t

The student starts as the teacher. The position of token i sees noise i and must predict token i; a
raster-order teacher predicted that one position earlier, and a next-scale teacher from f̂. Attention
and feed-forward layers carry over all the same, and training without them fails.

A pair whose first tokens are the student's own is shown from the step after them on only.

Losses (App. B, C): cross entropy of the logits; LPIPS between the frozen decoder's images of
the predicted embeddings and of the teacher's tokens; and, our additions, the squared error of
the embeddings and a discriminator between the decoder's images of the student's likeliest tokens
and of the teacher's. Each has its weight in the recipe.

Why a discriminator: a student that cannot compute the map to the end minimises cross entropy by
the likeliest token of each place, taken alone. Such tokens need not go together. The
discriminator sees the whole picture, and asks only that it could be one of the teacher's (of pairs
that begin with the student's tokens: one that the teacher went on with).

Shapes: B batch, L tokens, C code dimension, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core import plan
from dd_core.codebook import lookup
from dd_core.errors import RecipeError
from dd_core.layout import data_positions
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer, new_student
from dd_core.noise import stream_seed
from dd_core.runtime import mixed_precision
from dd_core.sampling import Sampler, renoise
from training.data.conditions import ClassConditions, Conditions
from training.losses.adversarial import Adversary, ramp
from training.losses.lpips import Lpips
from training.optim.loop import Batches, Ema, HasState, Stage, one_cycle, plain, update_at
from training.recipes.settings import DistillRecipe, Recipe
from training.stages.growth import deepened
from training.stages.pairs import Pairs
from training.stages.teacher import MatrixOptimizer, sample_grid


def student_from_teacher(teacher: AnyTeacher, codebook_VC: Tensor, seed: int) -> AnyStudent:
    """A student that carries the teacher's weights (line 1 of Algorithm 2)."""
    torch.manual_seed(stream_seed(seed, 0, "student-init"))
    return new_student(teacher.cfg).to(codebook_VC.device).from_teacher(teacher, codebook_VC)


def transplanted(student: AnyStudent, old_teacher: AnyTeacher, old_student: AnyStudent) -> AnyStudent:
    """A student whose weights move by what distillation changed in another pair: θ + (θ'_S − θ'_T).

    For a teacher that was trained on from `old_teacher`, of which `old_student` was distilled: what turns
    a teacher of this architecture into a student is much the same. What only students have is
    `old_student`'s; what depends on the condition stays.
    """
    before, after, own = old_teacher.state_dict(), old_student.state_dict(), student.state_dict()
    for key, value in own.items():
        if key.startswith(student.CONDITION) or key not in after or after[key].shape != value.shape:
            continue
        shared = key in before and before[key].shape == value.shape
        own[key] = value + (after[key] - before[key]) if shared else after[key]
    student.load_state_dict(own)
    return student


def _optimizer(model: AnyStudent, cfg: DistillRecipe) -> tuple[HasState, Callable[[float], None]]:
    """The optimizer, and its update at a factor of the peak learning rates."""
    if cfg.optimizer == "adamw":
        groups = [{"params": list(model.parameters()), "peak": cfg.lr}]
        adamw = torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
        return adamw, partial(update_at, adamw)
    if cfg.optimizer == "muon":
        muon = MatrixOptimizer(model, lr=cfg.lr, matrix_lr=cfg.matrix_lr, weight_decay=cfg.weight_decay)
        return muon, muon.step
    raise RecipeError(
        f"distill.optimizer must be adamw or muon, not {cfg.optimizer!r}", param="distill.optimizer"
    )


def distill_stage(
    recipe: Recipe,
    pairs: Pairs,
    teacher: AnyTeacher,
    tokenizer: AnyTokenizer,
    lpips: Lpips | None,
    device: torch.device,
    first: AnyStudent | None = None,
    conditions: Conditions | None = None,
    own: Pairs | None = None,
) -> tuple[Stage, Ema, AnyStudent]:
    """The stage, the average whose weights are the result, and the student being trained.

    Args:
        first: a student to go on from, instead of the teacher's weights.
        conditions: what the pairs' labels stand for; None = classes.
        own: pairs that begin with a student's tokens, to learn from besides.

    Raises:
        RecipeError: a training step outside the layout, an unknown optimizer, or a perceptual
            loss without its weights.
    """
    cfg, layout = recipe.distill, teacher.layout
    conditions = conditions or ClassConditions(recipe.model.num_classes)
    if not cfg.train_steps or not all(0 <= t < layout.num_blocks for t in cfg.train_steps):
        raise RecipeError(
            f"distill.train_steps must lie in 0..{layout.num_blocks - 1}, got {cfg.train_steps}",
            param="distill.train_steps",
        )
    for name in ("lpips", "adversarial"):
        if getattr(cfg, name) and lpips is None:
            raise RecipeError(
                f"distill.{name} needs the LPIPS weights; set it to 0 to go without", param=f"distill.{name}"
            )
    codebook = tokenizer.codebook_VC.detach()
    begin = student_from_teacher(teacher, codebook, recipe.seed) if first is None else first
    student = deepened(begin, recipe.student.num_layers)
    (optimizer, optimize), ema = _optimizer(student, cfg), Ema(student, cfg.ema)
    sets = [pairs, own] if own is not None else [pairs]
    label_N, token_NL = (
        torch.cat(parts) for parts in zip(*[(p.labels, p.tokens) for p in sets], strict=True)
    )
    noise_NLC = torch.cat([p.noise(codebook.shape[1]) for p in sets])
    begin_N = torch.cat([torch.full_like(p.labels, p.begin) for p in sets])
    batches = Batches(len(token_NL), cfg.batch, recipe.seed)
    choices = torch.tensor(cfg.train_steps)
    if lpips is not None:
        lpips = lpips.to(device)
    adversary = Adversary(cfg.judge_lr, recipe.seed, device) if cfg.adversarial else None

    def update(step: int) -> dict[str, Tensor]:
        chosen = batches.at(step)
        target = token_NL[chosen].long().to(device)
        cond = conditions(label_N[chosen]).to(device)
        noise = noise_NLC[chosen].float().to(device)
        t = choices[torch.randint(len(choices), (len(chosen),))].maximum(begin_N[chosen]).to(device)
        clean = lookup(codebook, target)
        open_BL = (~data_positions(layout, t)).float()
        with mixed_precision(device):
            embeddings, logits = student(renoise(clean, noise, t, layout), cond, t)
        embeddings = embeddings.float()

        def over_open(value_BL: Tensor) -> Tensor:
            return (value_BL * open_BL).sum() / open_BL.sum()

        ce_N = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
        figures = {"cross_entropy": over_open(ce_N.view_as(target))}
        figures["mse"] = over_open((embeddings - clean).square().sum(-1))
        loss = cfg.cross_entropy * figures["cross_entropy"] + cfg.mse * figures["mse"]
        factor = one_cycle(step, cfg.steps, 1.0)
        if lpips is not None and cfg.lpips:
            part = _first(cfg.lpips_share, len(chosen))
            real, fake = _maps(lpips, tokenizer, clean[part], embeddings[part], open_BL[part])
            figures["lpips"] = lpips.distance(fake, real).mean()
            loss = loss + cfg.lpips * figures["lpips"]
        if lpips is not None and adversary is not None:
            part = _first(cfg.judged_share, len(chosen))
            codes = straight_through(logits[part].float(), codebook)
            real, fake = _maps(lpips, tokenizer, clean[part], codes, open_BL[part])
            figures["fooled"] = adversary.fooled(fake)
            figures["hinge"] = adversary.learn(real, fake, factor)
            loss = loss + cfg.adversarial * ramp(step, cfg.ramp * cfg.steps) * figures["fooled"]
        loss.backward()  # type: ignore[no-untyped-call]
        figures["gradient_norm"] = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimize(factor)
        ema.update(student)
        with torch.no_grad():
            figures["accuracy"] = over_open((logits.argmax(-1) == target).float())
        return figures

    def preview(path: Path) -> None:
        averaged = new_student(recipe.student).to(device)
        averaged.load_state_dict(ema.average)
        sampler = Sampler(layout, tokenizer, averaged.eval(), device=device, exact=False)
        sample_grid(sampler, plan.one_step(layout.num_blocks), path, conditions)

    parts: dict[str, Any] = {"model": student, "optimizer": optimizer, "ema": ema}
    if adversary is not None:
        parts |= {"judge": adversary.judge, "judging": adversary.optimizer}
    config = {
        "model": asdict(recipe.model),
        "distill": asdict(cfg),
        "seed": recipe.seed,
        "pairs": len(pairs.tokens),
    }
    config |= {"own": len(own.tokens)} if own is not None else {}
    return Stage("student", cfg.steps, parts, update, preview, plain(config)), ema, student


def straight_through(logits_BLV: Tensor, codebook_VC: Tensor) -> Tensor:
    """Code vectors `[B, L, C]` of the likeliest tokens, with the gradient of the expected vectors."""
    expected = logits_BLV.softmax(-1) @ codebook_VC
    return lookup(codebook_VC, logits_BLV.argmax(-1)) + (expected - expected.detach())


def _first(share: float, count: int) -> slice:
    return slice(max(1, round(share * count)))


def _maps(
    lpips: Lpips, tokenizer: AnyTokenizer, clean_BLC: Tensor, predicted_BLC: Tensor, open_BL: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """VGG16's maps of the decoder's pictures: of the teacher's codes, and with the open ones as predicted."""
    drawn = torch.where(open_BL[..., None] > 0, predicted_BLC, clean_BLC)
    with mixed_precision(clean_BLC.device):
        with torch.no_grad():
            real = lpips.features(tokenizer.to_image(clean_BLC).float())
        return real, lpips.features(tokenizer.to_image(drawn).float())
