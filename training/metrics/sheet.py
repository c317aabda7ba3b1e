"""A sheet of prompts that nobody trained on: a column a prompt, a block of rows a budget, a row a seed.

Shapes: B pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dd_core.bundle import Bundle
from dd_core.errors import RecipeError
from dd_core.plan import plan_for_budget
from dd_core.sampling import sample_images
from training.data import pictograms, text
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


def draw_sheet(
    bundle: Bundle, path: Path, prompts: Sequence[str], budgets: Sequence[int], seeds: int
) -> list[str]:
    """Draws every prompt with the plan of each budget and of each seed; returns the names of the plans.

    Raises:
        RecipeError: a model of classes, or a prompt that is a caption of the corpus.
        DataError: the corpus, which says so, is not in the cache.
    """
    if bundle.text is None:
        raise RecipeError(f"{bundle.name} is conditioned on classes, not on texts", param="bundle")
    known = set(text.captions_of(range(len(pictograms.load().concepts))).texts)
    if seen := [prompt for prompt in prompts if prompt.lower() in known]:
        raise RecipeError(f"captions of the corpus: {', '.join(seen)}", param="prompts")
    cond = bundle.text.encode(prompts)
    plans = [plan_for_budget(bundle.presets, budget).plan for budget in budgets]
    rows = [
        sample_images(bundle.sampler, plan, cond, [(seed, 0)] * len(prompts))
        for plan in plans
        for seed in range(seeds)
    ]
    images_B3HW = torch.cat(rows).permute(0, 3, 1, 2).float() / 127.5 - 1
    image_grid(images_B3HW, path, columns=len(prompts))
    return [plan.name for plan in plans]
