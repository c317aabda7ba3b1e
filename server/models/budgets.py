"""From a step budget, or a word for quality, to a plan, with the valid range in every refusal.

How many passes fit a time is decided by what waits and by measured milliseconds: `server.generation.planner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from dd_core.errors import InvalidPlanError
from dd_core.plan import Preset, plan_for_budget
from distilled_decoding.contract import Quality
from server.errors import BadRequestError


class BudgetRange(NamedTuple):
    """Budgets `first` to `last`, both included, that all lead to `preset`."""

    first: int
    last: int
    preset: Preset


class BudgetTable:
    """The best plan of every budget from the cheapest offered plan to the dearest.

    Args:
        presets: what the model offers; those not offered are left out.

    Raises:
        InvalidPlanError: nothing is offered.
    """

    def __init__(self, presets: Sequence[Preset]) -> None:
        costs = [preset.plan.cost for preset in presets if preset.offered]
        if not costs:
            raise InvalidPlanError("the model offers no plan", param="steps")
        self.least = min(costs)
        self.most = max(costs)
        self._best = [plan_for_budget(presets, budget) for budget in range(self.least, self.most + 1)]
        # Each plan that a budget leads to, once: dearer ones are better.
        self.ladder = tuple(dict.fromkeys(self._best))

    def pick(self, steps: int) -> Preset:
        """The plan for a budget of `steps` forward passes.

        Raises:
            BadRequestError: out of range: below the cheapest plan or above the full teacher.
        """
        if not self.least <= steps <= self.most:
            raise BadRequestError(
                f"steps must be from {self.least} to {self.most} (the full teacher), not {_short(steps)}",
                param="steps",
            )
        return self._best[steps - self.least]

    def of_quality(self, quality: Quality) -> Preset:
        """`low`: the cheapest plan; `high` and `auto`: the best; `medium`: the one half-way up."""
        last = len(self.ladder) - 1
        return self.ladder[{"low": 0, "medium": last // 2, "high": last, "auto": last}[quality]]

    def up_to(self, best: Preset, max_fid: float | None = None) -> tuple[Preset, ...]:
        """Plans from `best` down to the cheapest, with an FID of at most `max_fid`.

        Raises:
            BadRequestError: none of them is that good.
        """
        allowed = [p for p in self.ladder if p.plan.cost <= best.plan.cost]
        good = [p for p in allowed if max_fid is None or p.reaches(max_fid)]
        if not good:
            known = [p.fid for p in allowed if p.fid is not None]
            reached = (
                f"the best within this budget measures {min(known):.2f}" if known else "none is measured"
            )
            raise BadRequestError(
                f"min_quality asks for an FID of at most {max_fid:g}, and {reached} (GET /models lists all)",
                param="min_quality",
            )
        return tuple(reversed(good))

    @property
    def ranges(self) -> list[BudgetRange]:
        """The table in runs of equal plans, ascending."""
        runs = (list(run) for _, run in groupby(enumerate(self._best, self.least), itemgetter(1)))
        return [BudgetRange(run[0][0], *run[-1]) for run in runs]


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**12 else f"a number of {len(str(abs(number)))} digits"
