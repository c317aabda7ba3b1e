"""Which plan a request gets: what it asks for, and what the load leaves of it.

    wish ─▶ plans that it allows, best first ─▶ the first that is done in time ─▶ PlanChoice

*Requested* is the plan that an idle server would take; *applied* the one that this one takes now. They
differ only where the request leaves the choice: by a time (`latency_budget_ms`, `quality: auto`), or under
load, where fewer passes for everyone come before a refusal for some (brown-out), unless it says
`brownout: false`. Pure logic: forecasts come from the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dd_core.plan import Preset
from distilled_decoding.contract import Quality
from server.models.budgets import BudgetTable
from server.scheduling.backlog import Forecast


@dataclass(frozen=True)
class PlanQuery:
    """What a request says about its plan; times are in seconds from now.

    Args:
        steps, quality: how much to spend at most; at most one of them is set.
        latency: it would like to be done by then.
        deadline: it must be done by then.
        most_fid: worse plans are not wanted at all.
        brownout: fewer passes are better than a long wait or a refusal.
    """

    steps: int | None = None
    quality: Quality | None = None
    latency: float | None = None
    deadline: float | None = None
    most_fid: float | None = None
    brownout: bool = True


class PlanChoice(NamedTuple):
    """The plan that was asked for, and the one that is spent."""

    requested: Preset
    applied: Preset


def choose(
    budgets: BudgetTable,
    wish: PlanQuery,
    default: Preset,
    longest_wait: float,
    forecast: Callable[[Preset], Forecast],
) -> PlanChoice:
    """The plans for a request.

    Args:
        default: the best plan to spend where the wish names none.
        longest_wait: seconds of waiting for others beyond which fewer passes are spent; 0 = never.
        forecast: when a request with this plan would be done. Not asked where there is one plan only.

    Raises:
        BadRequestError: no plan is within the wish.
    """
    best = default
    if wish.steps is not None:
        best = budgets.pick(wish.steps)
    elif wish.quality is not None:
        best = budgets.of_quality(wish.quality)
    elif wish.latency is not None:
        best = budgets.ladder[-1]
    allowed = budgets.up_to(best, wish.most_fid)
    if len(allowed) == 1:
        return PlanChoice(allowed[0], allowed[0])
    known: dict[str, Forecast] = {}

    def time_of(preset: Preset) -> Forecast:
        name = preset.plan.name
        if name not in known:
            known[name] = forecast(preset)
        return known[name]

    limits = [wish.latency, wish.deadline if wish.brownout else None]
    limit = min((seconds for seconds in limits if seconds is not None), default=None)
    idle = (p for p in allowed if limit is None or time_of(p).alone <= limit)
    requested = next(idle, allowed[-1])

    def in_time(preset: Preset) -> bool:
        if limit is not None and time_of(preset).finish > limit:
            return False
        if not wish.brownout or not longest_wait:
            return True
        return time_of(preset).finish - time_of(preset).alone <= longest_wait

    cheaper = allowed[allowed.index(requested) :]
    return PlanChoice(requested, next((p for p in cheaper if in_time(p)), cheaper[-1]))
