"""The plans of a stream, each dearer and better than the last: pure logic.

    dd-1 ─▶ dd-2 ─▶ hybrid ─▶ …       the same noise, each picture complete

A two-step plan's first jump is the one-step plan: its picture is decoded on the way, and the tokens before
the second step are the very ones that the second picture keeps. Nothing is computed twice for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dd_core.plan import Plan, Preset


@dataclass(frozen=True)
class RefinementStep:
    """A plan to run, and the cheaper one whose picture its first jump is, or None."""

    plan: Plan
    preview: Plan | None = None


def refinement_steps(
    ladder: Sequence[Preset], target: Plan, previews: int | None
) -> tuple[RefinementStep, ...]:
    """The plans that lead to `target`.

    Args:
        ladder: plans that may be shown, cheapest first.
        previews: most pictures before the last one; None = all.
    """
    cheaper = [preset.plan for preset in ladder if preset.plan.cost < target.cost]
    found: list[RefinementStep] = []
    for plan in [*cheaper[:previews], target]:
        before = found[-1] if found else None
        if before is not None and before.preview is None and _begins(before.plan, plan):
            found[-1] = RefinementStep(plan, before.plan)
        else:
            found.append(RefinementStep(plan))
    return tuple(found)


def _begins(first: Plan, then: Plan) -> bool:
    """Whether the first jump of `then` is all of `first`."""
    return (
        len(first.segments) == 1
        and len(then.segments) > 1
        and first.segments[0].actor == then.segments[0].actor == "student"
        and first.first_continuous == then.first_continuous
    )
