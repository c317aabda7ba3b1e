"""Budgets: from a number of steps to the best measured plan."""

from __future__ import annotations

import pytest

from dd_core.errors import InvalidPlanError
from dd_core.plan import Preset, few_steps, hybrid, one_step, onestep, teacher
from server.errors import BadRequestError
from server.models.budgets import BudgetTable

PRESETS = (
    Preset(one_step(64), fid=40.0),
    Preset(few_steps(64, 20), fid=35.0),
    Preset(hybrid(64, 10, 20), fid=36.0),
    Preset(teacher(64), fid=30.0),
    Preset(onestep(64), fid=1.0, offered=False),
)


@pytest.mark.parametrize(
    ("steps", "plan"), [(1, "dd-1"), (2, "dd-2"), (3, "dd-2"), (12, "dd-2"), (63, "dd-2"), (64, "teacher")]
)
def test_a_budget_gets_the_best_measured_plan_that_fits(steps: int, plan: str) -> None:
    """Not the dearest: pre-trained-11-21 costs 12 passes, but was measured worse than two steps."""
    assert BudgetTable(PRESETS).pick(steps).plan.name == plan


@pytest.mark.parametrize("steps", [0, -1, 65, 10**9, 10**400])
def test_a_budget_out_of_range_is_refused_with_the_range(steps: int) -> None:
    with pytest.raises(BadRequestError, match="from 1 to 64") as caught:
        BudgetTable(PRESETS).pick(steps)
    assert caught.value.param == "steps"
    assert len(caught.value.message) < 120


def test_ranges_cover_every_budget_once() -> None:
    ranges = BudgetTable(PRESETS).ranges
    assert [(r.first, r.last, r.preset.plan.name) for r in ranges] == [
        (1, 1, "dd-1"),
        (2, 63, "dd-2"),
        (64, 64, "teacher"),
    ]


def test_a_model_that_offers_nothing_is_refused() -> None:
    with pytest.raises(InvalidPlanError):
        BudgetTable([Preset(onestep(64), offered=False)])
