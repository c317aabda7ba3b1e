"""The time that a plan takes."""

from __future__ import annotations

import statistics
import time

import torch

from dd_core.plan import Plan
from dd_core.sampling import Sampler, sample_images
from training.data.conditions import Conditions

_REPEATS = 10


def plan_times(
    sampler: Sampler, plan: Plan, batch: int, seed: int, conditions: Conditions
) -> tuple[float, float]:
    """Milliseconds of one image alone (median of ten), and images a second in a batch.

    Whole calls: noise, plan, decoder, pixels back on the CPU.
    """

    def seconds(count: int) -> float:
        cond = conditions(torch.arange(count) % conditions.count)
        keys = [(seed, i) for i in range(count)]
        began = time.perf_counter()
        sample_images(sampler, plan, cond, keys)
        return time.perf_counter() - began

    seconds(1)
    alone = statistics.median(seconds(1) for _ in range(_REPEATS))
    seconds(batch)
    return 1e3 * alone, batch / seconds(batch)
