"""The teacher alone at several scales of classifier-free guidance: which of them to make pairs with.

    scale ─▶ the teacher's images (i mod K, keys (seed, i)) ─▶ FID KID …, right condition ─▶ row

A student learns the guided teacher's distribution and cannot unlearn it, so the scale is chosen before
`pairs` (`pairs.guidance`, `pairs.guidance_schedule`). More guidance makes the condition plainer and pictures
more alike: precision rises, recall falls, and the best FID lies between.

Shapes: N images, K conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dd_core import plan
from dd_core.errors import RecipeError
from dd_core.logits import LogitSettings
from dd_core.models.build import AnyTokenizer
from training import parallel
from training.data.sources import class_names, material
from training.metrics.caption_retrieval import asked_for
from training.metrics.features import Extractor, FeatureExtractor, precision_on
from training.metrics.judge import Judge
from training.metrics.report import Row, shown, with_spread, write_grid, write_record
from training.metrics.rows import fingerprint_of, once
from training.metrics.sets import Sets
from training.run import (
    Run,
    load_drawing_tokenizer,
    load_teacher,
    load_tokenizer,
    measuring_seed,
    sampler_without_marginals,
)
from training.trained import weights_of

_MOST = 1000  # as of `LogitSettings`
_COLUMNS = 10  # of the grid that shows every scale's first pictures


@dataclass(frozen=True)
class Scale:
    """A scale of guidance and its schedule over the blocks, as `pairs.guidance` and
    `pairs.guidance_schedule`.
    """

    schedule: Literal["constant", "linear"]
    value: float

    @property
    def name(self) -> str:
        """As `linear-5.5`."""
        return f"{self.schedule}-{self.value:g}"

    def of(self, draw: LogitSettings) -> LogitSettings:
        """The settings with this guidance. Raises InvalidRequestError: a value below 0."""
        return replace(draw, guidance=self.value, guidance_schedule=self.schedule)


def scales_of(constant: str, linear: str) -> tuple[Scale, ...]:
    """Scales from two lists of numbers with commas between.

    Raises:
        RecipeError: no number, one twice, or none at all.
    """
    found = [*_listed("constant", constant), *_listed("linear", linear)]
    if not found:
        raise RecipeError("name some scales, as --constant 1,2 or --linear 2,4", param="constant")
    return tuple(found)


def _listed(schedule: Literal["constant", "linear"], text: str) -> list[Scale]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [-1.0]
    if len(set(values)) < len(values) or not all(0 <= value <= _MOST for value in values):
        raise RecipeError(
            f"--{schedule} takes different numbers of 0..{_MOST} with commas between, as 1,2.5, not {text!r}",
            param=schedule,
        )
    return [Scale(schedule, value) for value in values]


def sweep(run: Run, scales: Sequence[Scale], images: int, extractor: Extractor | None = None) -> list[Row]:
    """A row for each scale, also in `RUN/guidance/`: `guidance.md`, `guidance.json`, and `guidance.png`, the
    same conditions and seeds at every scale.

    All of it resumes. Of several ranks, all of which call this, each draws its share.

    Args:
        images: how many each scale draws, at least 10.
        extractor: None = Inception in the recipe's precision.

    Returns:
        the rows; none on the other ranks.

    Raises:
        RecipeError: tokenizer or teacher are missing, or there are not ten images to measure against.
        DataError: the real images or the Inception weights cannot be had.
    """
    recipe = run.recipe
    if recipe.data == "none":
        raise RecipeError(f"the recipe {recipe.name!r} has no images to measure against", param="recipe")
    cfg = replace(recipe.evaluate, images=images)
    with parallel.in_turn():
        tokenizer, teacher = _tokenizer(run), load_teacher(run, load_tokenizer(run))
        reference, test, prompts = material(run)
        measurer = extractor or FeatureExtractor(run.device, precision_on(run.device, cfg.precision))
    reference = reference.first(cfg.reference)
    if len(reference.images) < 10:
        raise RecipeError("evaluate.reference must be at least 10", param="evaluate.reference")
    conditions = asked_for(len(class_names(recipe)), prompts)
    judge = Judge(reference, measurer, conditions.count, prompts)
    seed, out = measuring_seed(recipe, "choice"), run.out / "guidance"
    made: dict[str, Any] = {"seed": seed, "images": images, "classes": conditions.count, **judge.identity}
    sampler = replace(sampler_without_marginals(run, tokenizer, None, teacher), exact=False)
    weights = weights_of(sampler)
    chosen = plan.teacher(sampler.layout.num_blocks, draw="flow")
    sets = [
        Sets(
            replace(sampler, draw=scale.of(sampler.draw)),
            *(cfg, reference, test, reference.images, conditions, measurer, weights, made, seed),
            out / scale.name,
        )
        for scale in scales
    ]
    if parallel.connected():
        for each in sets:
            each.features(chosen.name, each.drawn(chosen)[0])
    if not parallel.leave():
        return []
    among = None if prompts is None else prompts.agreement.among
    rows: list[Row] = []
    first: list[Tensor] = []
    columns = min(_COLUMNS, conditions.count, images)
    for scale, each in zip(scales, sets, strict=True):
        drawn, labels = each.drawn(chosen)
        first.append(drawn[:columns])

        def row(
            scale: Scale = scale, each: Sets = each, drawn: Tensor = drawn, labels: Tensor = labels
        ) -> Row:
            features = each.features(chosen.name, drawn)
            answers = judge.answers(features, labels, drawn)
            return judge.measure(scale.name, "plan", features, labels, answers=answers)

        rows.append(once(out / scale.name / "row.json", fingerprint_of(each.key(chosen)), row))
        record = {"settings": {**made, "weights": weights}, "rows": [asdict(r) for r in rows]}
        write_record(record, table(rows, among), out / "guidance")
        write_grid(torch.cat(first), out / "guidance.png", columns)
    return rows


def table(rows: Sequence[Row], among: int | None = None) -> str:
    """The rows as Markdown; of a model of texts captions are told `among` so many."""
    by_text = among is not None
    right = f"right caption of {among}" if by_text else "right class"
    columns = ("guidance", "images", "FID", "KID ·10³", "precision", "recall", right)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in rows:
        cells = (
            r.name.replace("-", " ", 1),
            f"{r.images:,} against {r.reference_images:,}",
            f"{r.fid:.2f}",
            with_spread(r.kid, r.kid_std, 1e3),
            shown(r.precision, ".3f"),
            shown(r.recall, ".3f"),
            shown(r.right_caption if by_text else r.class_accuracy, ".3f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _tokenizer(run: Run) -> AnyTokenizer:
    """The tokenizer that draws; stage (a)'s where stage (a′) has not been yet, which may come after pairs."""
    if (run.out / "decoder.safetensors").exists():
        return load_drawing_tokenizer(run)
    return load_tokenizer(run)
