"""A run with every stage done, for tests of what comes of it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.training.fakes import Mean
from training.recipes.named import get_recipe
from training.run import Run
from training.stages import decoder, distill, evaluate, pairs, teacher, tokenizer


def finished_run(recipe: str, out: Path) -> Run:
    """A run of a tiny recipe, on the material that `DD_CACHE` and `DD_LPIPS` name."""
    run = Run(get_recipe(recipe), out, torch.device("cpu"))
    for stage in (tokenizer, decoder, teacher, pairs, distill):
        stage.run(run)
    evaluate.run(run, extractor=Mean(), timing=False)
    return run
