"""Which plan a request gets: what it asks for, and what the load leaves of it.

    wish ─▶ plans that it allows, best first ─▶ the first that is done in time ─▶ Choice

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
from server.backlog import Forecast
from server.budget import BudgetTable
from server.schemas import Quality


@dataclass(frozen=True)
class Wish:
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


class Choice(NamedTuple):
    """The plan that was asked for, and the one that is spent."""

    requested: Preset
    applied: Preset


def choose(
    budgets: BudgetTable,
    wish: Wish,
    default: Preset,
    longest_wait: float,
    forecast: Callable[[Preset], Forecast],
) -> Choice:
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
        return Choice(allowed[0], allowed[0])
    times = {preset: forecast(preset) for preset in allowed}
    limits = [wish.latency, wish.deadline if wish.brownout else None]
    idle = [p for p in allowed if all(limit is None or times[p].alone <= limit for limit in limits)]
    requested = idle[0] if idle else allowed[-1]

    def in_time(preset: Preset) -> bool:
        time = times[preset]
        if wish.latency is not None and time.finish > wish.latency:
            return False
        if not wish.brownout:
            return True
        if wish.deadline is not None and time.finish > wish.deadline:
            return False
        return not longest_wait or time.finish - time.alone <= longest_wait

    cheaper = allowed[allowed.index(requested) :]
    return Choice(requested, next((p for p in cheaper if in_time(p)), cheaper[-1]))
