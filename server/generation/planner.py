"""Which plan a request gets, by what it asks for and what the load leaves of it, and the steps to it.

    PlanQuery ─▶ plans that it allows, best first ─▶ the first that is done in time ─▶ PlanChoice
    PlanChoice ─▶ refinement steps: dd-1 ─▶ dd-2 ─▶ hybrid ─▶ …   the same noise, each image complete

*Requested* is the plan that an idle server would take; *applied* the one that this one takes now. They
differ only where the request leaves the choice: by a time (`latency_budget_ms`, `quality: auto`), or under
load, where fewer passes for everyone come before a refusal for some (brown-out), unless it says
`brownout: false`. A request that names its plan leaves none, and does not come here. Pure logic: forecasts
come from the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dd_core.plan import ACTORS, Plan, Preset
from distilled_decoding.contract import Quality
from server.errors import BadRequestError
from server.models.budgets import BudgetTable
from server.scheduling.backlog import Forecast


@dataclass(frozen=True)
class PlanQuery:
    """The part of a request that is about its plan; times are in seconds from now.

    Args:
        steps, quality: how much to spend at most; at most one of them is set.
        latency: it would like to be done by then.
        deadline: it must be done by then.
        max_fid: worse plans are not accepted.
        brownout: fewer passes are better than a long wait or a refusal.
    """

    steps: int | None = None
    quality: Quality | None = None
    latency: float | None = None
    deadline: float | None = None
    max_fid: float | None = None
    brownout: bool = True


class PlanChoice(NamedTuple):
    """The plan that was asked for, and the one that is applied."""

    requested: Preset
    applied: Preset


def choose(
    budgets: BudgetTable,
    query: PlanQuery,
    default: Preset,
    max_wait: float,
    forecast: Callable[[Preset], Forecast],
) -> PlanChoice:
    """Choose the plans for a request.

    Args:
        default: the best plan to spend where the query names none.
        max_wait: seconds of waiting for others beyond which fewer passes are spent; 0 = never.
        forecast: when a request with this plan would be done. Not asked where there is one plan only.

    Raises:
        BadRequestError: no plan fits the query.
    """
    best = default
    if query.steps is not None:
        best = budgets.pick(query.steps)
    elif query.quality is not None:
        best = budgets.of_quality(query.quality)
    elif query.latency is not None:
        best = budgets.ladder[-1]
    allowed = budgets.up_to(best, query.max_fid)
    if len(allowed) == 1:
        return PlanChoice(allowed[0], allowed[0])
    known: dict[str, Forecast] = {}

    def time_of(preset: Preset) -> Forecast:
        name = preset.plan.name
        if name not in known:
            known[name] = forecast(preset)
        return known[name]

    limits = [query.latency, query.deadline if query.brownout else None]
    limit = min((seconds for seconds in limits if seconds is not None), default=None)
    idle = (p for p in allowed if limit is None or time_of(p).alone <= limit)
    requested = next(idle, allowed[-1])

    def in_time(preset: Preset) -> bool:
        if limit is not None and time_of(preset).finish > limit:
            return False
        if not query.brownout or not max_wait:
            return True
        return time_of(preset).finish - time_of(preset).alone <= max_wait

    cheaper = allowed[allowed.index(requested) :]
    return PlanChoice(requested, next((p for p in cheaper if in_time(p)), cheaper[-1]))


def choose_again(made_by: Preset, max_fid: float | None) -> PlanChoice:
    """Choose the plan of a receipt, for a request that asks for no other.

    Raises:
        BadRequestError: it is not known to reach `max_fid`.
    """
    if max_fid is not None and not made_by.reaches(max_fid):
        raise BadRequestError(
            f"the receipt's plan {made_by.plan.name} does not reach the FID that min_quality asks for: "
            "leave it out, or send steps",
            param="min_quality",
        )
    return PlanChoice(made_by, made_by)


@dataclass(frozen=True)
class RefinementStep:
    """A plan to run, and the cheaper one whose image its first jump is, or None."""

    plan: Plan
    preview: Plan | None = None


def refinement_steps(
    ladder: Sequence[Preset], target: Plan, previews: int | None
) -> tuple[RefinementStep, ...]:
    """Return the plans that lead to `target`, cheapest first.

    A two-step plan's first jump is the one-step plan: its image is decoded on the way, and the tokens before
    the second step are the very ones that the second image keeps. Nothing is computed twice for it.

    Args:
        ladder: plans that may be shown, cheapest first.
        previews: most images before the last one; None = all.
    """
    cheaper = [preset.plan for preset in ladder if preset.plan.cost < target.cost]
    steps: list[RefinementStep] = []
    for plan in [*cheaper[:previews], target]:
        before = steps[-1] if steps else None
        if before is not None and before.preview is None and _begins(before.plan, plan):
            steps[-1] = RefinementStep(plan, before.plan)
        else:
            steps.append(RefinementStep(plan))
    return tuple(steps)


def _begins(first: Plan, then: Plan) -> bool:
    """Tell whether the first jump of `then` is all of `first`."""
    return (
        len(first.segments) == 1
        and len(then.segments) > 1
        and first.segments[0].actor == then.segments[0].actor
        and ACTORS[first.segments[0].actor].whole
        and first.first_continuous == then.first_continuous
    )
