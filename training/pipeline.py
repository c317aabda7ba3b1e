"""The stages in order, over one run folder; each reads what the earlier ones left there.

start     ─▶ tokenizer, teacher, first-student and tokens.safetensors of a bundle (instead of training them)
tokenizer ─▶ tokenizer.safetensors, tokens.safetensors
decoder   ─▶ decoder.safetensors: the tokenizer that draws; same codes, so nothing else waits for it
teacher   ─▶ teacher.safetensors
pairs     ─▶ pairs/
own-pairs ─▶ own-pairs/: begun by first-student, gone on with by the teacher
distill   ─▶ student.safetensors
evaluate  ─▶ evaluation.json, evaluation.md, pictures

`training.stages.export` makes a bundle of what they leave.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dd_core.bundle import Bundle, load_bundle
from dd_core.errors import RecipeError
from dd_core.files import replacing, save_tensors
from dd_core.flow import FlowSettings
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer, new_student, new_teacher, new_tokenizer
from dd_core.runtime import native_bfloat16
from dd_core.sampling import Sampler
from training import parallel
from training.data import captions, text
from training.data.conditions import Conditions
from training.data.images import ImageSet, lpips_weights
from training.data.sources import class_names, load_images
from training.losses.lpips import Lpips
from training.measure import Subject
from training.metrics.features import Extractor, FeatureExtractor, Precision
from training.metrics.report import Row
from training.mismatch import difference
from training.optim.loop import Ema, Stage, run_stage
from training.presets import presets
from training.recipes.settings import EvaluateRecipe
from training.run import (
    Run,
    facts_of,
    load_drawing_tokenizer,
    load_first_student,
    load_student,
    load_teacher,
    load_tokenizer,
    read,
    save,
)
from training.stages.decoder import decoder_stage
from training.stages.distill import distill_stage, student_from_teacher, transplanted
from training.stages.evaluate import Prompted, evaluate_plans
from training.stages.pairs import load_pairs, make_pairs, marginals, weights_digest
from training.stages.teacher import draw_settings, teacher_stage
from training.stages.tokenizer import encode_all, tokenizer_stage

_CAPTIONS, _PROMPTS = "captions.safetensors", "prompts.safetensors"
_OWN_PAIRS = "own-pairs"
_LARGEST_TABLE = 2**28  # token frequencies; of ImageNet's classes they would be 11 GB and more
log = logging.getLogger("dd_train")


def train_images(run: Run) -> ImageSet:
    """The images that the run learns from: all that there are, or the first ones of a small recipe."""
    images, _ = load_images(run)
    of_pictures = run.recipe.data == "pictograms"  # whose views were chosen by picture
    return images.first(0 if of_pictures else run.recipe.train_images)


def train_tokenizer(run: Run) -> None:
    """Stage (a), and the tokens of all training images."""
    with parallel.in_turn():
        images, lpips = train_images(run), Lpips(lpips_weights())
        first = _begin_from(run).sampler.tokenizer if run.recipe.begin_from else None
    assert first is None or isinstance(first, AnyTokenizer)
    stage, ema = tokenizer_stage(run.recipe, images, lpips, run.device, first)
    if _run(run, stage, ema, new_tokenizer(run.recipe.tokenizer_model)):
        write_tokens(run)


def _begin_from(run: Run) -> Bundle:
    bundle = load_bundle(str(run.recipe.begin_from), run.device)
    if bundle.manifest.vq != run.recipe.tokenizer_model:
        raise RecipeError(
            f"{bundle.name} has another tokenizer than the recipe {run.recipe.name!r}: "
            + difference(
                {"tokenizer_model": asdict(bundle.manifest.vq)},
                {"tokenizer_model": asdict(run.recipe.tokenizer_model)},
            ),
            param="begin_from",
        )
    return bundle


def _images_of(run: Run) -> dict[str, object]:
    """The settings that say which images the tokens are of."""
    recipe = run.recipe
    found = {"data": recipe.data, "train_images": recipe.train_images, "views": recipe.views}
    found |= {} if recipe.mirror else {"mirror": False}
    return found | ({} if recipe.folder is None else {"folder": recipe.folder.digest})


def write_tokens(run: Run) -> None:
    """`tokens.safetensors`: the codes of all training images and of their mirror images."""
    images = train_images(run)
    mirrored = run.recipe.mirror and run.recipe.data != "pictograms"  # which have such views of their own
    tokens = encode_all(load_tokenizer(run), images, run.device, mirrored=mirrored)
    if parallel.is_main():
        save_tensors(
            {"tokens": tokens, "labels": images.labels.to(torch.int32)},
            run.out / "tokens.safetensors",
            facts_of(_images_of(run)),
        )
    parallel.barrier()
    used = len(torch.unique(tokens))
    log.info(
        "tokenizer: %d of %d codes occur in the training images",
        used,
        run.recipe.tokenizer_model.codebook_size,
    )


def train_decoder(run: Run) -> None:
    """Stage (a′): nothing where the recipe gives it no steps."""
    if not run.recipe.decoder.steps:
        return
    with parallel.in_turn():
        tokenizer, tokens = load_tokenizer(run), read(run, "tokens", "tokenizer", _images_of(run))["tokens"]
        images, lpips = train_images(run), Lpips(lpips_weights())
    stage, ema = decoder_stage(run.recipe, images, tokens, tokenizer, lpips, run.device)
    _run(run, stage, ema, new_tokenizer(run.recipe.tokenizer_model))


def train_teacher(run: Run) -> None:
    """Stage (b)."""
    recipe = run.recipe
    with parallel.in_turn():
        tokens, tokenizer = read(run, "tokens", "tokenizer", _images_of(run)), load_tokenizer(run)
        conditions = None if recipe.text is None else text.train_conditions(recipe, run.out / _CAPTIONS)
        first = _begin_from(run).sampler.teacher if recipe.begin_from else None
    assert first is None or isinstance(first, AnyTeacher)
    labels = tokens["labels"].long()
    stage, ema = teacher_stage(recipe, tokens["tokens"], labels, tokenizer, run.device, conditions, first)
    _run(run, stage, ema, new_teacher(run.recipe.model, tokenizer))


def generate_pairs(run: Run, prompts: Path | None = None) -> None:
    """Stage (c). For a model of texts, of the prompts of a file, or of the captions of the pictures.

    Pairs need prompts alone, no images: `pairs/prompts.txt` keeps them, and settles them for this run.

    Raises:
        RecipeError: an earlier stage is missing, prompts for a model of classes, or pairs of others.
    """
    if prompts is not None and run.recipe.text is None:
        raise RecipeError(f"the recipe {run.recipe.name!r} is conditioned on classes", param="prompts")
    _make_pairs(run, run.out / "pairs", prompts=prompts)


def generate_own_pairs(run: Run) -> None:
    """Stage (c'): pairs that begin with the tokens of the student that the run was started from, up to the
    first later training step, and on which the teacher goes on.

    Raises:
        RecipeError: an earlier stage is missing, no student to begin with, or no later training step.
    """
    later = [t for t in run.recipe.distill.train_steps if t]
    if not run.recipe.pairs.own or not later:
        raise RecipeError(
            "own pairs need their number, pairs.own, and a later step in distill.train_steps",
            param="pairs.own",
        )
    _make_pairs(run, run.out / _OWN_PAIRS, load_first_student(run), min(later))


def _make_pairs(
    run: Run, out: Path, student: AnyStudent | None = None, begin: int = 0, prompts: Path | None = None
) -> None:
    recipe, tokenizer = run.recipe, load_tokenizer(run)
    teacher = load_teacher(run, tokenizer)
    conditions: int | Conditions = recipe.model.num_classes
    digest = ""
    if recipe.text is not None:
        lines = pair_prompts(run, prompts)
        conditions = text.prompt_conditions(recipe, lines, run.out / _PROMPTS, run.device)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    draw, device = draw_settings(recipe), run.device
    makers: list[nn.Module | Tensor] = [teacher, tokenizer.codebook_VC]
    makers += [student] if student is not None else []
    make_pairs(
        Sampler(recipe.model.layout, tokenizer, student, teacher, draw=draw, device=device),
        recipe.pairs if student is None else replace(recipe.pairs, count=recipe.pairs.own),
        conditions,
        out,
        # Other noise than the trajectories' (+ 1) and the evaluation's (+ 2).
        seed=recipe.seed + (1 if student is None else 3),
        identity=weights_digest(*makers),
        prompts=digest,
        begin=begin,
        stop_after=run.stop_after,
        job=run.job.of_rank(),
    )
    parallel.barrier()  # where distillation follows, it needs all shards


def pair_prompts(run: Run, file: Path | None = None) -> list[str]:
    """The prompts that the run's pairs are of; `pairs/prompts.txt` holds them from the first call on.

    Without a file they are captions of the pictures to learn from, no more of them than pairs.
    """
    kept = run.out / "pairs" / "prompts.txt"
    lines = text.readable(run.recipe, captions.read_prompts(file)) if file else None
    if kept.exists():
        found = captions.read_prompts(kept)
        if lines is not None and lines != found:
            raise RecipeError(
                f"{kept.parent} holds pairs of other prompts; choose another --out", param="prompts"
            )
        return found
    if lines is None and run.recipe.data == "none":
        raise RecipeError(
            f"the recipe {run.recipe.name!r} has no captions of its own: name a file with --prompts",
            param="prompts",
        )
    lines = lines or text.train_prompts(run.recipe)[: run.recipe.pairs.count]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def distill(run: Run) -> None:
    """Stage (d)."""
    cfg = run.recipe.distill
    begin_from = {"student": load_first_student, "transplant": _transplanted}.get(cfg.start)
    conditions = None
    with parallel.in_turn():
        lpips = Lpips(lpips_weights()) if cfg.lpips or cfg.adversarial else None
        pairs, tokenizer = load_pairs(run.out / "pairs", run.recipe.pairs), load_tokenizer(run)
        first = begin_from(run) if begin_from else None
        if run.recipe.text is not None:
            conditions = text.prompt_conditions(run.recipe, pair_prompts(run), run.out / _PROMPTS, run.device)
        own = load_pairs(run.out / _OWN_PAIRS, run.recipe.pairs) if run.recipe.pairs.own else None
        teacher = load_teacher(run, tokenizer)
    stage, ema, _ = distill_stage(
        run.recipe, pairs, teacher, tokenizer, lpips, run.device, first, conditions, own
    )
    _run(run, stage, ema, new_student(run.recipe.student))


def _transplanted(run: Run) -> AnyStudent:
    if run.recipe.begin_from is None:
        raise RecipeError("distill.start=transplant needs begin_from, a bundle", param="distill.start")
    old = _begin_from(run).sampler
    if not (isinstance(old.teacher, AnyTeacher) and isinstance(old.student, AnyStudent)):
        raise RecipeError(f"{run.recipe.begin_from} lacks a teacher or a student", param="begin_from")
    if old.student.cfg != old.teacher.cfg:
        raise RecipeError(
            f"the student of {run.recipe.begin_from} has other blocks than its teacher: "
            "what distillation changed cannot be told",
            param="distill.start",
        )
    tokenizer = load_tokenizer(run)
    fresh = student_from_teacher(
        load_teacher(run, tokenizer), tokenizer.codebook_VC.detach(), run.recipe.seed
    )
    return transplanted(fresh, old.teacher, old.student)


def load_models(run: Run) -> tuple[AnyTokenizer, AnyStudent, AnyTeacher]:
    """Every model of the run, for evaluation and export."""
    return load_drawing_tokenizer(run), load_student(run), load_teacher(run, load_tokenizer(run))


def sampler_of(run: Run, tokenizer: AnyTokenizer, student: AnyStudent, teacher: AnyTeacher) -> Sampler:
    """The sampler of a run's models, with the token frequencies of its pairs for the baselines, where
    their table can be held.
    """
    recipe = run.recipe
    frequency = None
    table = recipe.model.num_classes * recipe.model.layout.num_tokens * recipe.model.codebook_size
    if recipe.text is None and table <= _LARGEST_TABLE:
        pairs = load_pairs(run.out / "pairs", run.recipe.pairs)
        classes, codes = recipe.model.num_classes, recipe.model.codebook_size
        frequency = marginals(pairs.tokens, pairs.labels, classes, codes)
        frequency = frequency.to(run.device)
    flow = FlowSettings(recipe.pairs.solver, recipe.pairs.evaluations)
    return Sampler(
        recipe.model.layout,
        tokenizer,
        student,
        teacher,
        frequency,
        draw_settings(recipe),
        flow,
        run.device,
    )


def evaluate(run: Run, extractor: Extractor | None = None, timing: bool = True) -> list[Row]:
    """Stage (e): figures of every plan, in `evaluation.json` and `evaluation.md`.

    Raises:
        RecipeError: an earlier stage is missing, or the recipe has no images to measure against.
    """
    if run.recipe.data == "none":
        raise RecipeError(
            f"the recipe {run.recipe.name!r} has no images to measure against: name some with --reference",
            param="recipe",
        )
    sampler, cfg = sampler_of(run, *load_models(run)), run.recipe.evaluate
    parts = {
        "tokenizer": sampler.tokenizer,
        "student": sampler.student,
        "teacher": sampler.teacher,
        "marginal": sampler.marginals_KLV,
    }
    prompts: Prompted | None = None
    if run.recipe.text is not None:
        reference, test, prompts = text.held_out(run.recipe, run.out, Lpips(lpips_weights()))
    else:
        reference, test = load_images(run)
        test = test.first(cfg.test)
    return evaluate_plans(
        sampler,
        presets(run.recipe),
        cfg,
        reference,
        test,
        run.out / "evaluation",
        weights={k: weights_digest(p) for k, p in parts.items() if isinstance(p, nn.Module | Tensor)},
        seed=run.recipe.seed + 2,
        class_names=class_names(run.recipe),
        extractor=extractor or FeatureExtractor(run.device, _precision(cfg, run.device)),
        timing=timing,
        prompts=prompts,
    )


def subject_of(run: Run) -> Subject:
    """The run's models as `training.measure` measures them.

    Raises:
        RecipeError: an earlier stage is missing.
    """
    models = load_models(run)
    plans = [preset.plan for preset in presets(run.recipe)]
    return Subject(
        run.recipe.name, run.recipe.model, sampler_of(run, *models), plans, weights_digest(*models)
    )


def reference_folder(run: Run) -> Path:
    """The place of figures against a given reference: of a run without images, that of its evaluation."""
    return run.out / ("evaluation" if run.recipe.data == "none" else "evaluation-reference")


def _precision(cfg: EvaluateRecipe, device: torch.device) -> Precision:
    if cfg.precision != "auto":
        return cfg.precision
    return "bfloat16" if device.type == "cpu" and native_bfloat16(device) else "float32"


def _run(run: Run, stage: Stage, ema: Ema, shape_of: nn.Module) -> bool:
    """Trains, and writes the averaged weights if the stage came to its end; every rank finds them then."""
    r = run.recipe
    step = run_stage(
        stage,
        run.out,
        seed=r.seed,
        log_every=r.log_every,
        save_every=r.save_every,
        preview_every=r.preview_every,
        stop_after=run.stop_after,
        tensorboard=r.tensorboard,
    )
    if step < stage.steps:
        return False
    shape_of.load_state_dict(ema.average)
    if parallel.is_main():
        save(run, stage.name, shape_of)
    parallel.barrier()
    return True
