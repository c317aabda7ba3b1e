"""A run with every stage done, for tests of what comes of it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.training.fakes import Mean
from training import pipeline
from training.recipes.named import get_recipe
from training.run import Run


def finished_run(recipe: str, out: Path) -> Run:
    """A run of a tiny recipe, on the material that `DD_CACHE` and `DD_LPIPS` name."""
    run = Run(get_recipe(recipe), out, torch.device("cpu"))
    pipeline.train_tokenizer(run)
    pipeline.train_decoder(run)
    pipeline.train_teacher(run)
    pipeline.generate_pairs(run)
    pipeline.distill(run)
    pipeline.evaluate(run, extractor=Mean(), timing=False)
    return run
