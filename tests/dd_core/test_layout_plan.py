"""Layouts, masks and plans: numbers only."""

from __future__ import annotations

import pytest
import torch

from dd_core import plan
from dd_core.errors import InvalidPlanError, InvalidRequestError
from dd_core.layout import TokenLayout, data_positions, student_mask, teacher_mask
from dd_core.plan import Plan, Preset, Segment, plan_for_budget
from dd_core.sampling import renoise

VAR = TokenLayout((1, 4, 9, 16, 25, 36, 64, 100, 169, 256))


def test_var_layout_has_the_papers_numbers() -> None:
    assert (VAR.num_blocks, VAR.num_tokens, VAR.starts[5]) == (10, 680, 55)


def test_raster_masks_are_the_causal_mask() -> None:
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.equal(teacher_mask(TokenLayout.raster(6)), causal)
    assert torch.equal(student_mask(TokenLayout.raster(6)), causal)


def test_masks_differ_inside_a_block_only() -> None:
    layout = TokenLayout((1, 3))
    inside = teacher_mask(layout) & ~student_mask(layout)
    assert inside.nonzero().tolist() == [[2, 3], [2, 4], [3, 2], [3, 4], [4, 2], [4, 3]]


@pytest.mark.parametrize("sizes", [(), (1, 0), (-1,)])
def test_impossible_layouts_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError, match="block_sizes"):
        TokenLayout(sizes)


def test_renoise_boundaries_per_sample() -> None:
    layout = TokenLayout((1, 2, 3))
    x, noise = torch.ones(4, 6, 1), torch.zeros(4, 6, 1)
    kept = renoise(x, noise, torch.tensor([0, 1, 2, 3]), layout.block_index())[..., 0]
    assert kept.sum(1).tolist() == [0, 1, 3, 6]
    assert data_positions(layout.block_index(), torch.tensor([2]))[0].tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("made", "name", "cost"),
    [
        # Table 2 of the paper: VAR's 3, 4 and 6 passes, LlamaGen's 22, 42 and 81.
        (plan.hybrid(10, 4, 5), "pre-trained-5-6", 3),
        (plan.hybrid(10, 3, 5), "pre-trained-4-6", 4),
        (plan.hybrid(10, 0, 5), "pre-trained-1-6", 6),
        (plan.hybrid(256, 60, 80), "pre-trained-61-81", 22),
        (plan.hybrid(256, 40, 80), "pre-trained-41-81", 42),
        (plan.hybrid(256, 0, 80), "pre-trained-1-81", 81),
        (plan.one_step(256), "dd-1", 1),
        (plan.few_steps(256, 80), "dd-2", 2),
        (plan.few_steps(256, 40, 80), "dd-3", 3),
        (plan.teacher(256), "teacher", 256),
        (plan.trajectory(256), "trajectory", 256),
        (plan.skip(256, 106), "skip-106", 150),
        (plan.skip(10, 1), "skip-1", 9),
        (plan.onestep(256), "onestep", 1),
    ],
)
def test_cost_in_forward_passes(made: Plan, name: str, cost: int) -> None:
    assert (made.name, made.cost) == (name, cost)


@pytest.mark.parametrize(
    "segments",
    [
        (),
        (Segment("student", 1, 4),),
        (Segment("student", 0, 2), Segment("teacher", 3, 4)),
        (Segment("student", 0, 0),),
        (Segment("oracle", 0, 4),),  # type: ignore[arg-type]
    ],
)
def test_broken_plans_are_refused(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(InvalidPlanError):
        Plan("broken", segments)


def test_budget_picks_the_best_measured_plan_that_fits() -> None:
    offered = [
        Preset(plan.one_step(64), fid=40.0),
        Preset(plan.few_steps(64, 20), fid=35.0),
        Preset(plan.hybrid(64, 10, 20), fid=36.0),
        Preset(plan.teacher(64), fid=30.0),
        Preset(plan.onestep(64), fid=1.0, offered=False),
    ]
    chosen = [plan_for_budget(offered, budget).plan.name for budget in (1, 2, 12, 63, 64, 1000)]
    assert chosen == ["dd-1", "dd-2", "dd-2", "dd-2", "teacher", "teacher"]
    with pytest.raises(InvalidPlanError, match="budget of 0"):
        plan_for_budget(offered, 0)


def test_budget_without_figures_prefers_the_dearer_plan() -> None:
    offered = [Preset(plan.one_step(64)), Preset(plan.few_steps(64, 20)), Preset(plan.teacher(64))]
    assert plan_for_budget(offered, 10).plan.name == "dd-2"
