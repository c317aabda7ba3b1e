"""From a step budget to a plan, with the valid range in every refusal.

How many passes fit a deadline needs measured milliseconds and would live here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dd_core.errors import InvalidPlanError
from dd_core.plan import Preset, plan_for_budget
from server.errors import BadRequestError


@dataclass(frozen=True)
class BudgetRange:
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

    @property
    def ranges(self) -> list[BudgetRange]:
        """The table in runs of equal plans, ascending."""
        runs: list[BudgetRange] = []
        for steps, preset in enumerate(self._best, start=self.least):
            if runs and runs[-1].preset == preset:
                runs[-1] = BudgetRange(runs[-1].first, steps, preset)
            else:
                runs.append(BudgetRange(steps, steps, preset))
        return runs


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**12 else f"a number of {len(str(abs(number)))} digits"
