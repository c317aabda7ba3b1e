"""A sheet of classes or prompts: each a column, a seed a block of rows, of each budget one.

Shapes: B pictures, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dd_core.bundle import Bundle
from dd_core.condition import ClassCondition
from dd_core.errors import RecipeError
from dd_core.plan import plan_for_budget
from dd_core.sampling import sample_images
from training.data import pictograms, text
from training.data.images import from_pixels
from training.metrics.plots import image_grid

# Combinations that the corpus does not have: `draw_sheet` checks that none is one of its captions.
UNSEEN = (
    "a smiling cat with sunglasses",
    "purple cat",
    "green heart with a bow",
    "smiling pizza",
    "blue apple, flat style",
    "robot with a hat",
    "angry cloud",
    "yellow car, glossy style",
    "red fish",
    "snowman, firefox style",
    "pink dragon, 3d style",
    "a heart in red and gold",
)
_MOST_SHOWN = 20  # classes, of those that nobody named


def draw_sheet(
    bundle: Bundle,
    path: Path,
    words: Sequence[str],
    budgets: Sequence[int],
    seeds: int,
    scale: int = 2,
    columns: int | None = None,
) -> list[str]:
    """Draw every prompt or class of each seed with the plan of each budget; return the plans' names.

    A seed is a block of rows, one a plan: what more passes make of the same noise stands below it.

    Args:
        words: prompts; of a model of classes their names; none = `UNSEEN`, and the first 20 classes.
        budgets: most passes of each row of a block; none = what the bundle's plans cost.
        scale: screen pixels to a pixel.
        columns: of more prompts than these each seed has several blocks; None = all beside each other.

    Raises:
        RecipeError: one of `UNSEEN` is a caption of the corpus, or the model has no such class.
        DataError: the corpus, which says so, is not in the cache.
    """
    cond = _classes(bundle, words) if bundle.text is None else bundle.text.encode(words or _unseen())
    budgets = budgets or sorted({preset.plan.cost for preset in bundle.presets})
    plans = list(dict.fromkeys(plan_for_budget(bundle.presets, budget).plan for budget in budgets))
    width = min(columns or len(cond), len(cond))
    rows: list[Tensor] = []
    for seed in range(seeds):
        keys = [(seed, 0)] * len(cond)
        drawn = [torch.split(sample_images(bundle.sampler, plan, cond, keys), width) for plan in plans]
        rows += [_filled(part, width) for block in zip(*drawn, strict=True) for part in block]
    image_grid(from_pixels(torch.cat(rows)), path, columns=width, scale=scale, block=len(plans))
    return [plan.name for plan in plans]


def _filled(image_BHW3: Tensor, width: int) -> Tensor:
    """A row of `width` pictures, those that are missing white."""
    white = image_BHW3.new_full((width - len(image_BHW3), *image_BHW3.shape[1:]), 255)
    return torch.cat([image_BHW3, white])


def _unseen() -> Sequence[str]:
    """The prompts that nobody trained on. Raises RecipeError where one is a caption of the corpus."""
    known = set(text.captions_of(range(len(pictograms.load().concepts))).texts)
    if seen := [prompt for prompt in UNSEEN if prompt.lower() in known]:
        raise RecipeError(f"captions of the corpus: {', '.join(seen)}", param="prompts")
    return UNSEEN


def _classes(bundle: Bundle, names: Sequence[str]) -> ClassCondition:
    classes = bundle.manifest.classes
    if missing := [name for name in names if name not in classes]:
        known = ", ".join(classes) if len(classes) <= _MOST_SHOWN else f"one of {len(classes)} names"
        raise RecipeError(f"{bundle.name} has no class {missing[0]!r}; it has {known}", param="prompts")
    chosen = [classes.index(name) for name in names or classes[:_MOST_SHOWN]]
    return ClassCondition(torch.tensor(chosen))
