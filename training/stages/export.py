"""The bundle of an evaluated run, which is what `dd-server` serves; and that of its teacher alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from dd_core.bundle import save_bundle
from dd_core.errors import RecipeError
from dd_core.manifest import Manifest, PresetEntry
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer
from dd_core.sampling import Sampler
from dd_core.text.config import MiniLMConfig
from training.data import text
from training.data.images import About
from training.data.origin import has_origin, read_origin
from training.data.sources import about
from training.examples import read_examples
from training.metrics.report import read_another_seed
from training.metrics.rows import read_rows
from training.optim.loop import plain
from training.presets import presets, runs
from training.recipes.settings import Recipe
from training.run import (
    Run,
    load_drawing_tokenizer,
    load_teacher,
    load_tokenizer,
    sampler_without_marginals,
)
from training.trained import load_models, sampler_of, weights_of

_EXAMPLES = 16  # of a bundle; a page offers the first of them


def run(run: Run, name: str, folder: Path) -> Manifest:
    """Writes the bundle of a finished run, with the figures of its evaluation by plan name.

    Raises:
        RecipeError: a stage has not been run, or not to its end, or the figures are of other weights.
    """
    models = load_models(run)
    sampler = sampler_of(run, *models)
    asked = presets(run.recipe)
    names = [p.plan.name for p in asked]
    rows = read_rows(run.out / "evaluation" / "rows", weights_of(sampler), names)
    unmeasured = not rows and run.recipe.data == "none"  # it can be measured, but need not be
    if not rows and not unmeasured:
        raise RecipeError(
            f"no figures in {run.out}: run `{run.command('evaluate')}` first",
            param="out",
        )
    measured = {row.name: row.metrics() for row in rows if row.kind == "plan"}
    others = {row.name: row.metrics() for row in rows if row.kind != "plan"}
    chance = read_another_seed(run.out / "evaluation")
    if chance and any("teacher_lpips" in metrics for metrics in measured.values()):
        others["another-seed"] = chance  # beside nothing it says nothing
    # Only what was measured is offered: the planner compares figures.
    entries = [
        PresetEntry.of(p.plan, offered=p.offered, metrics=measured.get(p.plan.name, {}))
        for p in asked
        if p.plan.name in measured or (unmeasured and runs(sampler, p.plan))
    ]
    return _save(run, name, folder, sampler, models, entries, others)


def run_teacher(run: Run, name: str, folder: Path) -> Manifest:
    """Writes a bundle without a student: a teacher to distil, or to train on, elsewhere (`dd-train start`).

    Raises:
        RecipeError: the tokenizer or the teacher has not been trained to its end.
    """
    models = load_drawing_tokenizer(run), None, load_teacher(run, load_tokenizer(run))
    sampler = sampler_without_marginals(run, *models)
    # Whichever plans an evaluation is to measure: they may be the student's alone.
    everything = replace(run.recipe, evaluate=replace(run.recipe.evaluate, plans=()))
    entries = [
        PresetEntry.of(p.plan, offered=p.offered) for p in presets(everything) if runs(sampler, p.plan)
    ]
    return _save(run, name, folder, sampler, models, entries, {})


def _save(
    run: Run,
    name: str,
    folder: Path,
    sampler: Sampler,
    models: tuple[AnyTokenizer, AnyStudent | None, AnyTeacher],
    entries: list[PresetEntry],
    others: dict[str, dict[str, float]],
) -> Manifest:
    recipe, (tokenizer, student, teacher) = run.recipe, models
    described = _about(run, sampler)
    manifest = Manifest(
        name=name,
        family=recipe.model.family,
        description=described.description,
        image_size=recipe.image_size,
        classes=list(described.classes),
        examples=list(described.examples),
        text=recipe.text,
        vq=recipe.tokenizer_model,
        student=None if student is None else recipe.student,
        teacher=recipe.model,
        draw=sampler.draw,
        flow=sampler.flow,
        presets=entries,
        data=described.data,
        licence=described.licence,
        metrics=others,
        training=plain(asdict(_shareable(recipe))),
    )
    module, pieces = text.encoder(recipe.text) if isinstance(recipe.text, MiniLMConfig) else (None, b"")
    return save_bundle(
        folder,
        manifest,
        tokenizer=tokenizer,
        student=student,
        teacher=teacher,
        marginals_KLV=sampler.marginals_KLV,
        text=module,
        pieces=pieces,
    )


def _shareable(recipe: Recipe) -> Recipe:
    """The recipe without the places of folders on this machine: that of images, and a bundle's."""
    folder, begun = recipe.folder, recipe.begin_from
    return replace(
        recipe,
        folder=None if folder is None else replace(folder, path=Path(folder.path).name),
        begin_from=None if begun is None else Path(begun).name,
    )


def _about(run: Run, sampler: Sampler) -> About:
    """The description of the run's data, or of the data of the bundle that it was started from, if any.

    The examples are those that were chosen by measurement of these weights, if any were.
    """
    started = run.recipe.data == "none" and run.recipe.text is None
    described = read_origin(run.out) if started and has_origin(run.out) else about(_shareable(run.recipe))
    chosen = read_examples(run, sampler)[:_EXAMPLES]
    said = f"{described.description} The examples are some that it draws well, chosen by measurement."
    return replace(described, description=said, examples=chosen) if chosen else described
