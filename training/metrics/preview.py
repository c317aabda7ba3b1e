"""A picture of what a model draws while it is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from dd_core.plan import Plan
from dd_core.sampling import Sampler, sample_codes
from training.data.conditions import Conditions, spread
from training.metrics.plots import image_grid


@torch.inference_mode()
def sample_grid(sampler: Sampler, chosen: Plan, path: Path, conditions: Conditions, rows: int = 4) -> None:
    """A picture of `rows` samples (seed 0, indices 0, 1, …) of each class, a column a class.

    Of more than ten labels, some that are spread over all.
    """
    columns = min(10, conditions.count)
    labels = torch.tensor(spread(conditions.count, rows * columns))
    codes = sample_codes(sampler, chosen, conditions(labels), [(0, i) for i in range(len(labels))])
    image_grid(sampler.tokenizer.to_image(codes), path, columns=columns)
