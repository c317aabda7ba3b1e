"""The student's FID as it is distilled."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import torch

from dd_core.models.build import new_student
from dd_core.plan import Plan
from dd_core.sampling import Sampler
from training import parallel
from training.data.sources import class_names, material
from training.digest import weights_digest
from training.metrics.caption_retrieval import asked_for
from training.metrics.features import Extractor, FeatureExtractor, precision_on
from training.metrics.plan_fid import PlanFid
from training.optim.loop import Callback, Ema
from training.optim.progress import FID_IMAGES, FID_SECONDS, read_journal
from training.presets import presets
from training.recipes.settings import Recipe
from training.run import Run, load_drawing_tokenizer, measuring_seed

log = logging.getLogger("dd_train")
FID = "fid-"  # before a plan's name in the journal


def student_plans(recipe: Recipe) -> list[Plan]:
    """The one-step and few-step plans that the recipe measures."""
    return [p.plan for p in presets(recipe) if p.plan.needs == {"student"}]


def measure_fid(run: Run, ema: Ema, extractor: Extractor | None = None) -> Callback:
    """Measure the averaged student's plans every `evaluate_every` updates and at the end; each rank draws its
    share of the images.

    A line of the journal has the step, `fid-PLAN` of each plan, `fid_images`, and `fid_seconds`, which
    measuring took. A step that has a line of as many images is not measured again.

    Args:
        extractor: None = Inception in the recipe's precision.

    Raises:
        DataError, RecipeError: real images, the network or the tokenizer that draws cannot be had.
    """
    if not run.recipe.evaluate_every:
        return Callback(0, lambda _: None)
    journal, plans = run.out / "student.jsonl", student_plans(run.recipe)
    with parallel.in_turn():  # now, not after hours: these may be missing
        tokenizer, fid = load_drawing_tokenizer(run), plan_fid(run, extractor)

    def call(step: int) -> None:
        names = {f"{FID}{plan.name}" for plan in plans}
        found = any(line["step"] == step and names <= line.keys() for line in fid_lines(run))
        known = torch.tensor(int(found))
        parallel.send_to_all([known])  # what rank 0 has read
        if known:
            return
        began, averaged = time.perf_counter(), new_student(run.recipe.student).to(run.device)
        averaged.load_state_dict(ema.average)
        draw = run.recipe.pairs.draw_settings
        sampler = Sampler(
            run.recipe.model.layout, tokenizer, averaged.eval(), draw=draw, device=run.device, exact=False
        )
        weights = weights_digest(averaged, tokenizer)
        for plan in plans:
            fid.draw(sampler, plan, weights)
        if not parallel.is_main():
            return
        figures: dict[str, Any] = {f"{FID}{plan.name}": fid(sampler, plan, weights) for plan in plans}
        figures |= {FID_IMAGES: fid.images, FID_SECONDS: round(time.perf_counter() - began, 1)}
        with journal.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        fid.forget()
        shown = ", ".join(f"{plan.name} {figures[FID + plan.name]:.2f}" for plan in plans)
        log.info("student %d: FID %s (%d images)", step, shown, fid.images)

    return Callback(run.recipe.evaluate_every, call, at_end=True)


def fid_lines(run: Run) -> list[dict[str, Any]]:
    """The lines of the student's journal that have FIDs of as many images as the recipe says, by step."""
    return [
        line
        for line in read_journal(run.out / "student.jsonl")
        if line.get(FID_IMAGES) == run.recipe.evaluate.images
    ]


def plan_fid(run: Run, extractor: Extractor | None = None) -> PlanFid:
    """The measure of a run's plans, with the numbers of images of its evaluation.

    Args:
        extractor: None = Inception in the recipe's precision.
    """
    recipe, cfg, device = run.recipe, run.recipe.evaluate, run.device
    real, _, prompts = material(run)
    conditions = asked_for(len(class_names(recipe)), prompts)
    network = extractor or FeatureExtractor(device, precision_on(device, cfg.precision))
    noise, folder = measuring_seed(recipe, "choice"), run.out / "fid"
    return PlanFid(real.first(cfg.reference), conditions, network, folder, cfg.images, cfg.batch, noise)
