"""Previews that become the picture: the plans of a stream, and the pictures as they come.

    dd-1 ─▶ dd-2 ─▶ hybrid ─▶ …       the same noise under dearer plans, each picture complete

A two-step plan's first jump is the one-step plan: its picture is decoded on the way, and the tokens before
the second step are the very ones that the second picture keeps. Nothing is computed twice for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dd_core.plan import Plan, Preset
from server.engine import Engine
from server.images import Pixels
from server.jobs import Job
from server.orders import Order


@dataclass(frozen=True)
class Rung:
    """A plan to run, and the cheaper one whose picture its first jump is, or None."""

    plan: Plan
    preview: Plan | None = None


@dataclass(frozen=True)
class Picture:
    """A complete picture of image `index` of an order, by `plan`; `final` when no better one follows."""

    index: int
    pixels: Pixels
    plan: Plan
    stage: int
    final: bool
    job: Job


def rungs(ladder: Sequence[Preset], target: Plan, previews: int | None) -> list[Rung]:
    """The plans that lead to `target`.

    Args:
        ladder: a model's plans, cheapest first.
        previews: most pictures before the last one; None = all.
    """
    cheaper = [preset.plan for preset in ladder if preset.plan.cost < target.cost]
    plans = [*cheaper[:previews], target]
    found: list[Rung] = []
    for plan in plans:
        before = found[-1] if found else None
        if before is not None and before.preview is None and _begins(before.plan, plan):
            found[-1] = Rung(plan, before.plan)
        else:
            found.append(Rung(plan))
    return found


def _begins(first: Plan, then: Plan) -> bool:
    """Whether the first jump of `then` is all of `first`."""
    return (
        len(first.segments) == 1
        and len(then.segments) > 1
        and first.segments[0].actor == then.segments[0].actor == "student"
        and first.first_continuous == then.first_continuous
    )


class Refinement:
    """The pictures of one order, rung by rung; only one rung's job is under way at a time.

    Args:
        order: what to make.
        steps: its rungs, from `rungs`.
    """

    def __init__(self, engine: Engine, order: Order, steps: Sequence[Rung]) -> None:
        self._engine = engine
        self._order = order
        self._rungs = list(steps)
        self._job: Job | None = None
        self._answer: asyncio.Future[list[Pixels]] | None = None
        self._pictures: asyncio.Queue[tuple[int, Pixels, bool] | None] = asyncio.Queue()

    def begin(self) -> None:
        """Submit the first job.

        Raises:
            QueueFullError, DeadlineUnreachableError, DrainingError: refused.
        """
        self._submit(self._rungs[0])

    def _submit(self, rung: Rung) -> None:
        self._job = self._order.job(rung.plan, previews=rung.preview is not None)
        self._pictures = asyncio.Queue()
        queue = self._pictures
        self._answer = self._engine.submit(self._job, lambda *picture: queue.put_nowait(picture))
        self._answer.add_done_callback(lambda _: queue.put_nowait(None))

    async def pictures(self) -> AsyncIterator[Picture]:
        """The pictures of every image as they come; `begin` goes first, and `end` after it.

        Raises:
            ApiError: a later job was refused, or one failed.
        """
        stage = 0
        for number, rung in enumerate(self._rungs):
            if number:
                self._submit(rung)
            assert self._job is not None and self._answer is not None
            seen: set[tuple[int, bool]] = set()
            while (found := await self._pictures.get()) is not None:
                index, pixels, finished = found
                if (index, finished) in seen:  # the device died and began it again
                    continue
                seen.add((index, finished))
                plan, at = rung.plan, stage
                if rung.preview is not None:
                    plan, at = (rung.plan, stage + 1) if finished else (rung.preview, stage)
                last = finished and number == len(self._rungs) - 1
                yield Picture(index, pixels, plan, at, last, self._job)
            self._answer.result()
            stage += 1 if rung.preview is None else 2

    def end(self) -> None:
        """Nobody waits any more: what has not begun is not computed."""
        if self._job is not None:
            self._engine.cancel(self._job)
        if self._answer is not None:
            self._answer.cancel()
            with suppress(asyncio.CancelledError, Exception):
                self._answer.exception()
