"""Stage (d): distillation by Algorithm 2.

    pair (noise, tokens), t ~ {t_k} ─▶ X_t = renoise(tokens, noise, t) ─▶ F_θ ─▶ losses at positions ≥ t

The student starts as the teacher. The position of token i sees noise i and must predict token i; a
raster-order teacher predicted that one position earlier, and a next-scale teacher from f̂. Attention
and feed-forward layers carry over all the same, and training without them fails.

A pair whose first tokens are the student's own is shown from the step after them on only.

Losses (App. B, C): cross entropy of the logits; LPIPS between the frozen decoder's images of the
predicted embeddings and of the teacher's tokens; and, our additions, the squared error of the
embeddings and a discriminator between the decoder's images of the student's likeliest tokens and of
the teacher's. Each has its weight in the recipe. The decoder is that of stage (a′), if there is one.

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
from dd_core.layout import TokenLayout, data_positions
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer, new_student
from dd_core.noise import stream_seed
from dd_core.runtime import mixed_precision
from dd_core.sampling import Sampler, renoise
from training import parallel
from training.data import text
from training.data.ahead import Ahead, copied, pinned
from training.data.conditions import ClassConditions, Conditions
from training.losses.adversarial import Adversary, ramp
from training.losses.lpips import Lpips, lpips_weights
from training.losses.perceptual import enlarge
from training.metrics.features import Extractor
from training.metrics.preview import sample_grid
from training.mismatch import difference
from training.optim.loop import Batches, Ema, HasState, Stage, one_cycle, plain, update_at
from training.optim.memory import economical
from training.optim.muon import MatrixOptimizer
from training.parallel import Figures
from training.recipes.settings import DistillRecipe, Recipe
from training.run import (
    Run,
    begun_from,
    keep_exports,
    load_drawing_tokenizer,
    load_first_student,
    load_teacher,
    load_tokenizer,
    train,
)
from training.stages.growth import deepened
from training.stages.pairs import OWN_FOLDER, PROMPTS, Pairs, load_pairs, noise_of, pair_prompts, pairs_of
from training.stages.student_fid import measure_fid


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
    _check(cfg, layout, lpips)
    codebook = tokenizer.codebook_VC.detach()
    begin = student_from_teacher(teacher, codebook, recipe.seed) if first is None else first
    student = deepened(begin, recipe.student.num_layers)
    (optimizer, optimize), ema = _optimizer(student, cfg), Ema(student, cfg.ema)
    sets = [pairs, own] if own is not None else [pairs]
    label_N, token_NL = (
        torch.cat(parts) for parts in zip(*[(p.labels, p.tokens) for p in sets], strict=True)
    )
    begin_N = torch.cat([torch.full_like(p.labels, p.begin) for p in sets])
    batches = Batches(len(token_NL), cfg.batch, recipe.seed)
    parts = parallel.parts(batches.count, recipe.accumulate, "distill.batch")
    economical(recipe, [*student.blocks, *tokenizer.decoder.blocks])
    choices, block_L = torch.tensor(cfg.train_steps), layout.block_index()  # both on the host
    weight_L = torch.tensor(layout.block_sizes, dtype=torch.float32)[block_L] ** -cfg.evenness
    on_device_L = weight_L.to(device)
    if lpips is not None:
        lpips = lpips.to(device)
    adversary = Adversary(cfg.judge_lr, recipe.seed, device) if cfg.adversarial else None

    figure_names = ["cross_entropy", "mse", "accuracy"]
    figure_names += ["lpips"] if lpips is not None and cfg.lpips else []
    figure_names += ["fooled", "hinge"] if adversary is not None else []

    def load(step: int) -> tuple[Tensor, list[Tensor]]:
        chosen = batches.at(step)
        return chosen, [pinned(noise_of(sets, chosen[p.rows], codebook.shape[1]), device) for p in parts]

    ahead = Ahead(load, cfg.steps)

    def update(step: int) -> dict[str, Tensor]:
        chosen, noises = ahead.at(step)
        picked = conditions.pick(label_N[chosen])
        t_B = choices[torch.randint(len(choices), (len(chosen),))].maximum(begin_N[chosen])
        open_all = ~data_positions(block_L, t_B)
        opened, weighed = float(open_all.sum()), float((open_all * weight_L).sum())
        decoded, judged = (max(1, round(s * len(chosen))) for s in (cfg.lpips_share, cfg.judged_share))
        figures, weight = Figures(device, *figure_names), cfg.adversarial * ramp(step, cfg.ramp * cfg.steps)
        for part, noise in zip(parts, noises, strict=True):
            target = token_NL[chosen[part.rows]].long().to(device)
            cond, t = conditions.of(picked[part.rows]).to(device), t_B[part.rows].to(device)
            clean = lookup(codebook, target)
            open_BL = (~data_positions(student.block_L, t)).float()
            with mixed_precision(device):
                x_t = renoise(clean, copied(noise, device).float(), t, student.block_L)
                embeddings, logits = student(x_t, cond, t)
            embeddings = embeddings.float()
            ce_N = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
            counted_BL = open_BL * on_device_L
            found = {
                "cross_entropy": (ce_N.view_as(target) * counted_BL).sum() / weighed,
                "mse": ((embeddings - clean).square().sum(-1) * counted_BL).sum() / weighed,
                "accuracy": ((logits.detach().argmax(-1) == target) * open_BL).sum() / opened,
            }
            loss = cfg.cross_entropy * found["cross_entropy"] + cfg.mse * found["mse"]
            if lpips is not None and cfg.lpips and (n := part.among(decoded)):
                real, fake = _maps(lpips, tokenizer, clean[:n], embeddings[:n], open_BL[:n], cfg.enlarged)
                found["lpips"] = lpips.distance(fake, real).sum() / decoded
                loss = loss + cfg.lpips * found["lpips"]
            if lpips is not None and adversary is not None and (n := part.among(judged)):
                codes = straight_through(logits[:n].float(), codebook)
                real, fake = _maps(lpips, tokenizer, clean[:n], codes, open_BL[:n], cfg.enlarged)
                found |= adversary.opinions(real, fake, n / judged)
                loss = loss + weight * found["fooled"]
            loss.backward()
            figures.add(**found)
        parallel.sum_gradients(student.parameters())
        norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        factor = one_cycle(step, cfg.steps, 1.0)
        if adversary is not None:
            adversary.step(factor)
        optimize(factor)
        ema.update(student)
        return {**figures.total(), "gradient_norm": norm}

    def preview(path: Path) -> None:
        averaged = new_student(recipe.student).to(device)
        averaged.load_state_dict(ema.average)
        sampler = Sampler(layout, tokenizer, averaged.eval(), device=device, exact=False)
        sample_grid(sampler, plan.one_step(layout.num_blocks), path, conditions)

    state: dict[str, Any] = {"model": student, "optimizer": optimizer, "ema": ema}
    if adversary is not None:
        state |= {"judge": adversary.judge, "judging": adversary.optimizer}
    config = {
        "model": asdict(recipe.model),
        "distill": {name: value for name, value in asdict(cfg).items() if name != "pairs"},
        "seed": recipe.seed,
        "pairs": len(pairs.tokens),
    }
    config |= {"own": len(own.tokens)} if own is not None else {}
    return Stage("student", cfg.steps, state, update, batches, preview, plain(config)), ema, student


def _check(cfg: DistillRecipe, layout: TokenLayout, lpips: Lpips | None) -> None:
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


def straight_through(logits_BLV: Tensor, codebook_VC: Tensor) -> Tensor:
    """Code vectors `[B, L, C]` of the likeliest tokens, with the gradient of the expected vectors."""
    expected = logits_BLV.softmax(-1) @ codebook_VC
    return lookup(codebook_VC, logits_BLV.argmax(-1)) + (expected - expected.detach())


def _maps(
    lpips: Lpips,
    tokenizer: AnyTokenizer,
    clean_BLC: Tensor,
    predicted_BLC: Tensor,
    open_BL: Tensor,
    enlarged: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """VGG16's maps of the decoder's pictures: of the teacher's codes, and with the open ones as predicted."""
    drawn = torch.where(open_BL[..., None] > 0, predicted_BLC, clean_BLC)
    with mixed_precision(clean_BLC.device):
        with torch.no_grad():
            real = lpips.features(enlarge(tokenizer.to_image(clean_BLC).float(), enlarged))
        return real, lpips.features(enlarge(tokenizer.to_image(drawn).float(), enlarged))


def run(run: Run, extractor: Extractor | None = None) -> None:
    """Stage (d).

    Args:
        extractor: of `evaluate_every`; None = Inception.
    """
    cfg = run.recipe.distill
    begin_from = {"student": load_first_student, "transplant": _transplanted}.get(cfg.start)
    conditions = None
    with parallel.in_turn():
        lpips = Lpips(lpips_weights()) if cfg.lpips or cfg.adversarial else None
        tokenizer = load_tokenizer(run)
        teacher = load_teacher(run, tokenizer)
        pairs = pairs_of(run, teacher, tokenizer).first(cfg.pairs)
        drawing = load_drawing_tokenizer(run) if lpips is not None else tokenizer
        first = begin_from(run) if begin_from else None
        if run.recipe.text is not None:
            conditions = text.prompt_conditions(run.recipe, pair_prompts(run), run.out / PROMPTS, run.device)
        own = load_pairs(run.out / OWN_FOLDER, run.recipe.pairs) if run.recipe.pairs.own else None
    stage, ema, _ = distill_stage(
        run.recipe, pairs, teacher, drawing, lpips, run.device, first, conditions, own
    )
    shape = new_student(run.recipe.student)
    callbacks = keep_exports(run, "student", ema, shape), measure_fid(run, ema, extractor)
    train(run, stage, ema, shape, *callbacks)


def check_start(run: Run) -> None:
    """Do nothing if the student can begin as the recipe says; for before the stages that it waits for.

    Raises:
        RecipeError: what distillation changed in the bundle of `begin_from` cannot be carried over.
    """
    if run.recipe.distill.start == "transplant":
        _distilled_before(run)


def _distilled_before(run: Run) -> tuple[AnyTeacher, AnyStudent]:
    if run.recipe.begin_from is None:
        raise RecipeError("distill.start=transplant needs begin_from, a bundle", param="distill.start")
    bundle = begun_from(run)
    if bundle.manifest.vq != run.recipe.tokenizer_model:
        raise RecipeError(
            f"{bundle.name} has another tokenizer than the recipe {run.recipe.name!r}: "
            + difference(
                {"tokenizer_model": asdict(bundle.manifest.vq)},
                {"tokenizer_model": asdict(run.recipe.tokenizer_model)},
            ),
            param="begin_from",
        )
    old = bundle.sampler
    if not (isinstance(old.teacher, AnyTeacher) and isinstance(old.student, AnyStudent)):
        raise RecipeError(f"{run.recipe.begin_from} lacks a teacher or a student", param="begin_from")
    if old.student.cfg != old.teacher.cfg:
        raise RecipeError(
            f"the student of {run.recipe.begin_from} has other blocks than its teacher: "
            "what distillation changed cannot be told",
            param="distill.start",
        )
    return old.teacher, old.student


def _transplanted(run: Run) -> AnyStudent:
    tokenizer = load_tokenizer(run)
    fresh = student_from_teacher(
        load_teacher(run, tokenizer), tokenizer.codebook_VC.detach(), run.recipe.seed
    )
    return transplanted(fresh, *_distilled_before(run))
