"""The paper's ablations of distillation: FID against epochs, for several values of one setting.

    timesteps   Figure 7: the student's second step k, of {0, k}
    pairs       Figure 8: how many pairs it learns from, the first ones of the run's

Each value is distilled in a run folder of its own, below the run's, which has links to what all share:
tokenizer, teacher and pairs. The paper's models learn for tens of epochs; how long these do is an argument.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dd_core.errors import RecipeError
from dd_core.files import replacing
from dd_core.plan import Plan
from training import parallel
from training.digest import weights_digest
from training.metrics.features import Extractor
from training.metrics.plan_fid import PlanFid
from training.metrics.plots import fid_curves
from training.metrics.report import Row
from training.metrics.rows import measured, once
from training.mismatch import refuse_mismatch
from training.optim.loop import plain
from training.optim.progress import FID_SECONDS, read_journal
from training.presets import presets
from training.recipes.named import checked
from training.recipes.saved import read_recipe, remembered
from training.recipes.settings import Recipe
from training.run import Run, load_drawing_tokenizer, load_teacher, load_tokenizer, sampler_without_marginals
from training.stages import distill
from training.stages.pairs import FOLDER, OWN_FOLDER, PROMPTS, pairs_of
from training.stages.student_fid import FID, fid_lines, plan_fid, student_plans

log = logging.getLogger("dd_train")
Subject = Literal["timesteps", "pairs"]
_OPTION: dict[Subject, str] = {"timesteps": "steps", "pairs": "counts"}
# All that distillation and its evaluation read of a run, as far as it is there.
_SHARED = (
    *("tokenizer.safetensors", "decoder.safetensors", "teacher.safetensors", "first-student.safetensors"),
    *(FOLDER, OWN_FOLDER, PROMPTS, "origin.json"),
)


@dataclass(frozen=True)
class Ablation:
    """Values of one setting.

    Args:
        updates, every: of each distillation, and after how many its FID is measured; the last are, too.
        images: that a plan draws for one FID.
    """

    subject: Subject
    values: tuple[int, ...]
    updates: int
    every: int
    images: int

    def folder(self, run: Run) -> Path:
        """Where the runs, `ablation.json` and `ablation.png` are."""
        return run.out / f"ablation-{self.subject}"

    def check(self, recipe: Recipe) -> None:
        """Do nothing where a run of the recipe can take the values.

        Raises:
            RecipeError: it cannot; the message says which it takes.
        """
        if recipe.data == "none":
            raise RecipeError(
                f"the recipe {recipe.name!r} has no images for an ablation to measure against", param="recipe"
            )
        blocks, count = recipe.model.layout.num_blocks, recipe.pairs.count
        most = {"timesteps": blocks - 1, "pairs": count}[self.subject]
        option = _OPTION[self.subject]
        if len(set(self.values)) != len(self.values) or not all(1 <= v <= most for v in self.values):
            given = ",".join(map(str, self.values))
            raise RecipeError(f"--{option} takes different numbers of 1..{most}, not {given}", param=option)
        if self.every > self.updates:
            raise RecipeError(f"--every must be at most --updates, {self.updates}", param="every")

    def recipe(self, parent: Recipe, value: int) -> Recipe:
        """The recipe of one value's run."""
        distilled: dict[str, Any] = {"steps": self.updates}
        distilled |= {"train_steps": (0, value)} if self.subject == "timesteps" else {"pairs": value}
        recipe = replace(
            parent,
            keep_every=self.every,
            evaluate_every=self.every,
            distill=replace(parent.distill, **distilled),
            evaluate=replace(parent.evaluate, images=self.images, plans=()),
        )
        # Of the parent's plans those that this student has: hybrids are named by the second step.
        known = [plan.name for plan in student_plans(recipe)]
        plans = tuple(name for name in parent.evaluate.plans if name in known)
        return checked(replace(recipe, evaluate=replace(recipe.evaluate, plans=plans)))


def values_of(subject: Subject, steps: str | None, counts: str | None) -> tuple[int, ...]:
    """The values of an ablation from its options, of which it takes one.

    Raises:
        RecipeError: it is missing, is the other's, or is no list of numbers.
    """
    given = {"steps": steps, "counts": counts}
    option = _OPTION[subject]
    text = given.pop(option)
    other = next(iter(given))
    if text is None or given[other] is not None:
        raise RecipeError(
            f"ablate {subject} takes --{option}, numbers with commas between, and no --{other}", param=option
        )
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RecipeError(f"--{option} takes numbers with commas between, not {text!r}", param=option)
    return tuple(map(int, parts))


def ablate(run: Run, ablation: Ablation, extractor: Extractor | None = None) -> None:
    """Distil a student for each value, one after another, and write `ablation.json` and `ablation.png`.

    All of it resumes: a value's distillation and a measurement that was killed go on where they were. Every
    rank calls it.

    Raises:
        RecipeError: a stage before distillation is missing, values that cannot be, or runs that were begun
            with other settings.
    """
    ablation.check(run.recipe)
    with parallel.in_turn():
        tokenizer = load_tokenizer(run)
        pairs_of(run, load_teacher(run, tokenizer), tokenizer)
    runs = {value: _run_of(run, ablation, value) for value in ablation.values}
    with ExitStack() as held:
        if parallel.is_main():
            for each in runs.values():
                _prepare(run, each, held)
        with parallel.in_turn():
            fid = plan_fid(replace(next(iter(runs.values())), out=run.out), extractor)
        teacher = _teacher(run, fid)
        for each in runs.values():
            try:
                distill.run(each, fid.extractor)
            finally:  # points of a run that was interrupted are drawn, too
                if teacher is not None:
                    _write(ablation, runs, fid, teacher)
            if not (each.out / "student.safetensors").exists():
                return  # --stop-after ended it


def _run_of(run: Run, ablation: Ablation, value: int) -> Run:
    """The run of a value. Raises RecipeError where its folder has one of other settings."""
    out, recipe = ablation.folder(run) / str(value), ablation.recipe(run.recipe, value)
    if (saved := read_recipe(out)) is not None:
        made, wanted = plain(asdict(saved)), plain(asdict(recipe))
        refuse_mismatch(out, made, wanted, "say the same again, or remove the folder")
    return replace(run, out=out, recipe=recipe)


def _prepare(parent: Run, run: Run, held: ExitStack) -> None:
    """Hold the folder of a value's run, which keeps its recipe, and put the links there."""
    run.out.mkdir(parents=True, exist_ok=True)
    held.enter_context(remembered(run.out, run.recipe))
    for name in _SHARED:
        link, target = run.out / name, parent.out / name
        if target.exists() and not link.exists():
            link.unlink(missing_ok=True)  # a link to what is no more
            link.symlink_to(os.path.relpath(target, run.out))


def _teacher(run: Run, fid: PlanFid) -> Row | None:
    """The teacher's FID, of the same images; measured once for both ablations. None on the other ranks."""
    recipe = replace(run.recipe, evaluate=replace(run.recipe.evaluate, plans=("teacher",)))
    chosen: Plan = presets(recipe)[0].plan
    tokenizer = load_drawing_tokenizer(run)
    teacher = load_teacher(run, load_tokenizer(run))
    sampler = replace(sampler_without_marginals(run, tokenizer, None, teacher), exact=False)
    weights = weights_digest(tokenizer, teacher)
    path, fingerprint = run.out / "ablation-teacher.json", fid.fingerprint(sampler, chosen, weights)
    if measured(path, fingerprint) is None:
        fid.draw(sampler, chosen, weights)
    if not parallel.is_main():
        return None

    def make() -> Row:
        return Row(
            name=chosen.name,
            kind="plan",
            images=fid.images,
            reference_images=len(fid.reference.images),
            fid=fid(sampler, chosen, weights),
            kid=None,
            kid_std=None,
            precision=None,
            recall=None,
            manifold_images=0,
            passes=chosen.cost,
        )

    row = once(path, fingerprint, make)
    fid.forget()
    return row


def _write(ablation: Ablation, runs: Mapping[int, Run], fid: PlanFid, teacher: Row) -> None:
    """`ablation.json` and `ablation.png` of the runs that have figures; nothing where none has."""
    points = [point for value, run in runs.items() for point in _points(run, value)]
    if not points:
        return
    first = next(iter(runs.values()))
    out = first.out.parent
    settings = {
        "recipe": first.recipe.name,
        "updates": ablation.updates,
        "batch": first.recipe.distill.batch,
        "pairs": first.recipe.pairs.count,
        "images": ablation.images,
        "reference_images": len(fid.reference.images),
        "network": fid.extractor.fingerprint,
        "precision": fid.extractor.precision,
        "seed": first.recipe.seed,
        "device": str(first.device),
        "threads": torch.get_num_threads(),
        "hours": float(f"{sum(map(_seconds, runs.values())) / 3600:.3g}"),
    }
    report = {
        "ablation": ablation.subject,
        "settings": settings,
        "teacher": {"fid": teacher.fid, "passes": teacher.passes},
        "points": points,
    }
    with replacing(out / "ablation.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for point in points:
        label = f"k = {point['value']}" if ablation.subject == "timesteps" else f"{point['value']:,} pairs"
        curve = panels.setdefault(point["plan"], {}).setdefault(label, [])
        curve.append((point["epochs"], point["fid"]))
    fid_curves(panels, out / "ablation.png", teacher.fid)
    log.info("%s: %d points", out / "ablation.json", len(points))


def _points(run: Run, value: int) -> list[dict[str, Any]]:
    """What the journal of a value's run says of its plans."""
    recipe = run.recipe
    pairs = (recipe.distill.pairs or recipe.pairs.count) + recipe.pairs.own
    seen = min(recipe.distill.batch, pairs) / pairs  # epochs an update
    return [
        {
            "value": value,
            "plan": plan.name,
            "updates": line["step"],
            "epochs": line["step"] * seen,
            "fid": line[f"{FID}{plan.name}"],
            "passes": plan.cost,
        }
        for plan in student_plans(recipe)
        for line in fid_lines(run)
        if f"{FID}{plan.name}" in line
    ]


def _seconds(run: Run) -> float:
    """Seconds that a run's updates and measurements took; those that a kill undid are not counted."""
    lines = read_journal(run.out / "student.jsonl")
    seconds, done = sum(line.get(FID_SECONDS, 0.0) for line in lines), 0.0
    for line in lines:
        if "per_s" in line:
            seconds += (line["step"] - done) / line["per_s"]
            done = line["step"]
    return seconds
