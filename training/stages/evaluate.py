"""Stage (e): every plan measured against real images, in one table.

    plan ─▶ images (i mod K, keys (seed, i)) ─▶ features ─▶ FID KID precision recall ─▶ row ─▶ table

Beside the plans stand what they cannot pass (the tokenizer's reconstructions) and what real
images measure among themselves, with as many images: without these rows no figure here says
how much of it is the sampler's.

All of it resumes: images, features and rows are on disk under a fingerprint of what made them,
and a row is measured again only where that changed. Of several ranks each draws and extracts its
share; all leave then but rank 0, which makes the rows, and times plans on a quiet machine.

Shapes: N images, K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd_core.errors import InvalidRequestError, RecipeError
from dd_core.plan import Plan, Preset
from dd_core.sampling import Sampler
from training import parallel
from training.data.cifar10 import CIFAR10_CLASSES
from training.data.images import ImageSet
from training.data.sources import class_names, material
from training.losses.lpips import Lpips, lpips_weights
from training.metrics.caption_retrieval import Prompted, asked_for
from training.metrics.features import (
    Extractor,
    FeatureExtractor,
    content_hash,
    precision_on,
)
from training.metrics.judge import Judge
from training.metrics.report import Row, write_grid, write_report
from training.metrics.rows import figures_once, fingerprint_of, once
from training.metrics.sameness import TeachersPictures
from training.metrics.sets import Sets
from training.metrics.timing import plan_times
from training.presets import presets
from training.recipes.settings import EvaluateRecipe
from training.run import Run, measuring_seed
from training.trained import load_models, sampler_of, weights_of


def evaluate_plans(
    sampler: Sampler,
    measured: Sequence[Preset | Plan],
    recipe: EvaluateRecipe,
    reference: ImageSet,
    test: ImageSet,
    out: Path,
    *,
    weights: Mapping[str, str],
    seed: int = 0,
    extractor: Extractor | None = None,
    class_names: Sequence[str] = CIFAR10_CLASSES,
    timing: bool = True,
    prompts: Prompted | None = None,
    lpips: Lpips | None = None,
) -> list[Row]:
    """Measures every plan, the tokenizer and real images.

    Args:
        measured: plans, in the order of the table.
        recipe: `images` a plan; the first `reference` images of `reference`; sampling `batch`.
        reference: real images that every set is held against and that the probe learns from,
            the training images by the usual protocol.
        test: other real images, at least 20: the tokenizer reconstructs the first
            `recipe.images` of them (all of them where there are fewer), the same ones are held
            against the reference, and one half of all against the other.
        out: gets `samples/PLAN.safetensors`, `grids/PLAN.png`, `comparison.png`,
            `evaluation.json`, `evaluation.md`, `features/`, `rows/`.
        weights: a hash for each of `tokenizer`, `student`, `teacher`, `marginal`: a row is reused as
            long as those that its plan needs stay the same.
        extractor: None = Inception in float32 on the sampler's device.
        timing: False leaves out the time an image takes (say, on a machine that is busy).
        prompts: for a model of texts; the reference's label i is then that of prompt i, and the tokenizer
            reconstructs the reference, since `test` was learned from.
        lpips: to hold each plan's pictures against the teacher's of the same seeds, where `measured` has the
            plan `teacher` (`metrics.sameness`); None leaves that out.

    Returns:
        the rows of the table: plans, `reconstruction`, `real-test`, `real-split`; none on the other ranks.

    Raises:
        InvalidRequestError: too few images, two plans of one name, or `test` is the reference.
        InvalidPlanError: a plan that the sampler cannot run.
        DataError: the Inception weights cannot be had.
    """
    plans = [p.plan if isinstance(p, Preset) else p for p in measured]
    _check(plans, recipe, reference, test)
    measurer = extractor or FeatureExtractor(sampler.device)
    reference = ImageSet(reference.images[: recipe.reference], reference.labels[: recipe.reference])
    conditions = asked_for(len(class_names), prompts)
    judge = Judge(reference, measurer, conditions.count, prompts)
    identity = judge.identity
    by_prompts = {} if prompts is None else {"prompts": prompts.fingerprint}
    made = {"seed": seed, "images": recipe.images, "classes": conditions.count, **by_prompts}
    for folder in ("grids", "rows"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    held = test.first(recipe.images)
    drawn = held if prompts is None else reference.first(recipe.images)
    sets = Sets(
        sampler, recipe, reference, test, drawn.images, conditions, measurer, weights, made, seed, out
    )
    if parallel.connected():
        sets.share(plans)
    if not parallel.leave():
        return []
    settings = {
        **identity,
        **made,
        "weights": dict(weights),
        "device": sampler.device.type,
        "threads": torch.get_num_threads(),
        "batch": recipe.batch,
    }
    if prompts is not None:
        settings["candidates"] = prompts.agreement.among
        settings["right_caption_of_real"] = figures_once(
            out / "real-captions.json",
            identity,
            lambda: prompts.agreement(reference.images, reference.labels),
        )
    beside = _BesideTeacher(sets, judge, plans, lpips)
    columns = min(10, conditions.count)
    rows: list[Row] = []
    first: list[Tensor] = []

    def add(name: str, key: Mapping[str, object], make: Callable[[], Row], *parts: str) -> None:
        """The row, of `parts` of the weights."""
        fingerprint, own = fingerprint_of({**identity, **key}), {p: weights[p] for p in parts}
        rows.append(once(out / "rows" / f"{name}.json", fingerprint, make, own))
        write_report(rows, settings, out)

    for plan in plans:
        images, labels = sets.drawn(plan)
        write_grid(images[: 10 * columns], out / "grids" / f"{plan.name}.png", columns)
        first.append(images[:columns])

        def plan_row(plan: Plan = plan, images: Tensor = images, labels: Tensor = labels) -> Row:
            features = sets.features(plan.name, images)
            answers = judge.answers(features, labels, images)
            row = judge.measure(plan.name, "plan", features, labels, answers=answers)
            row = replace(row, **beside.figures(plan, images, answers))
            times = plan_times(sampler, plan, recipe.batch, seed, conditions) if timing else (None, None)
            return row.with_cost(plan.cost, *times)

        # A row without times is not the row that was asked for with them.
        asked = {"timing": timing, "batch": recipe.batch, "device": sampler.device.type}
        parts = {"tokenizer", *plan.needs, *({"teacher"} if beside.key() else ())}
        add(plan.name, {**sets.key(plan), **beside.key(), **asked}, plan_row, *sorted(parts))
    settings |= beside.another_seed()
    if first:
        write_grid(torch.cat(first), out / "comparison.png", len(first[0]))

    def reconstruction() -> Row:
        images = sets.reconstructed()
        write_grid(_pairs(drawn.images, images), out / "grids" / "reconstruction.png", 10)
        features, name = sets.features("reconstruction", images), "reconstruction"
        answers = judge.answers(features, drawn.labels, images)
        return judge.measure(name, name, features, drawn.labels, answers=answers)

    def real_test() -> Row:
        return judge.measure("real-test", "real", sets.real_features("test images"), held.labels)

    def real_split() -> Row:
        one, two = (sets.real_features(name) for name in ("first half", "second half"))
        return judge.measure("real-split", "real", two, test.labels[len(one) : 2 * len(one)], real=one)

    tested = {"tokenizer": weights["tokenizer"], "test": content_hash(drawn.images, drawn.labels)}
    add("reconstruction", tested, reconstruction, "tokenizer")
    add("real-test", {"test": content_hash(held.images, held.labels)}, real_test)
    add("real-split", {"test": content_hash(test.images, test.labels)}, real_split)
    return rows


class _BesideTeacher:
    """Figures of each plan's pictures beside the teacher's of the same seeds.

    None where there is no `lpips`, or no plan `teacher` among those measured.
    """

    def __init__(self, sets: Sets, judge: Judge, plans: Sequence[Plan], lpips: Lpips | None) -> None:
        self.sets, self.judge, self.lpips = sets, judge, lpips
        self.teacher = next((p for p in plans if p.name == "teacher"), None)

    @cached_property
    def pictures(self) -> TeachersPictures | None:
        if self.lpips is None or self.teacher is None:
            return None
        return TeachersPictures(
            *self._judged(self.sets, self.teacher), self.sets.conditions.count, self.lpips
        )

    def _judged(self, sets: Sets, plan: Plan) -> tuple[Tensor, Tensor]:
        """A plan's images, and what the judge takes each for."""
        images, labels = sets.drawn(plan)
        features = sets.features(plan.name, images)
        return images, self.judge.answers(features, labels, images)

    def key(self) -> dict[str, object]:
        """What the figures follow from besides the plan and its images."""
        if self.lpips is None or self.teacher is None:
            return {}
        return {"beside": self.sets.key(self.teacher), "lpips": self.lpips.fingerprint}

    def figures(self, plan: Plan, images: Tensor, answers: Tensor) -> dict[str, Any]:
        """By the names of a row."""
        if self.pictures is None or plan == self.teacher:
            return {}
        return self.pictures.against(images, answers).figures()

    def another_seed(self) -> dict[str, object]:
        """The same figures of the teacher's pictures of other seeds, for the report's settings."""
        teacher = self.teacher
        if self.lpips is None or teacher is None:
            return {}

        def figures() -> dict[str, float]:
            pictures = self.pictures
            assert pictures is not None, "there are lpips and teacher"
            found = pictures.another_seed()
            if found is None:
                found = pictures.against(*self._judged(self.sets.again(), teacher))
            return found.figures()

        key = {**self.judge.identity, **self.key()}
        return {"another_seed": figures_once(self.sets.out / "another-seed.json", key, figures)}


def _check(plans: list[Plan], recipe: EvaluateRecipe, reference: ImageSet, test: ImageSet) -> None:
    names = [p.name for p in plans]
    if len(set(names)) < len(names):
        raise InvalidRequestError(f"two plans have one name among {', '.join(names)}", param="presets")
    if recipe.images < 10:
        raise InvalidRequestError(f"a plan needs 10 or more images, not {recipe.images}", param="images")
    for what, have, want in (
        ("reference", len(reference.images), max(10, recipe.reference)),
        ("test", len(test.images), 20),
    ):
        if have < want:
            raise InvalidRequestError(f"evaluation needs {want} {what} images and has {have}", param=what)
    same = min(len(reference.images), len(test.images))
    if torch.equal(reference.images[:same], test.images[:same]):
        raise InvalidRequestError(
            "reference and test must be different images: the probe learns from the reference", param="test"
        )


def _pairs(image_N3HW: Tensor, other_NHW3: Tensor, columns: int = 10, rows: int = 5) -> Tensor:
    """Rows of real images, each above its reconstructions, `[·, H, W, 3]`."""
    real = image_N3HW.permute(0, 2, 3, 1)
    lines = min(rows, len(real) // columns)
    sheet = [p[i * columns : (i + 1) * columns] for i in range(lines) for p in (real, other_NHW3)]
    return torch.cat(sheet)


def run(run: Run, extractor: Extractor | None = None, timing: bool = True) -> list[Row]:
    """Stage (e): figures of every plan, in `evaluation.json` and `evaluation.md`.

    Raises:
        RecipeError: an earlier stage is missing, or the recipe has no images to measure against.
    """
    if run.recipe.data == "none":
        raise RecipeError(
            f"the recipe {run.recipe.name!r} has no images to measure against: name some with --reference",
            param="recipe",
        )
    cfg = run.recipe.evaluate
    with parallel.in_turn():
        sampler, (reference, test, prompts) = sampler_of(run, *load_models(run)), material(run)
        measurer = extractor or FeatureExtractor(run.device, precision_on(run.device, cfg.precision))
    return evaluate_plans(
        sampler,
        presets(run.recipe),
        cfg,
        reference,
        test,
        run.out / "evaluation",
        weights=weights_of(sampler),
        seed=measuring_seed(run.recipe, "evaluation"),
        class_names=class_names(run.recipe),
        extractor=measurer,
        timing=timing,
        prompts=prompts,
        lpips=Lpips(lpips_weights()),
    )
