"""Previews that become the picture: the pictures of a stream as they come, rung by rung."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import perf_counter

from dd_core.plan import Plan
from server.devices.pool import DevicePool
from server.devices.submission import Submission
from server.errors import DeadlineUnreachableError
from server.generation.encoder import Pixels
from server.generation.request import Order
from server.generation.rungs import RefinementStep
from server.scheduling.jobs import Job


@dataclass(frozen=True)
class Picture:
    """A complete picture of image `index` of an order, by `plan`; `final` when no better one follows."""

    index: int
    pixels: Pixels
    plan: Plan
    stage: int
    final: bool
    job: Job


class Refinement:
    """The pictures of one order, rung by rung; only one rung's job is under way at a time.

    Args:
        order: what to make.
    """

    def __init__(self, engine: DevicePool, order: Order) -> None:
        self._engine = engine
        self._order = order
        self._submission: Submission | None = None
        self._holds = False

    def begin(self) -> None:
        """Submit the first job; `end` must follow.

        Raises:
            DeadlineUnreachableError: all of it would not be done in time.
            QueueFullError, DrainingError: refused.
        """
        order = self._order
        if order.deadline is not None:
            time = order.forecast(self._engine, order.rungs)
            if perf_counter() + time.finish > order.deadline:
                raise DeadlineUnreachableError.after(
                    time.start,
                    f"this stream would start in {1e3 * time.start:.0f} ms and be done in "
                    f"{1e3 * time.finish:.0f} ms, after its deadline_ms",
                )
        self._submit(order.rungs[0])
        self._engine.hold(order.model.name)
        self._holds = True

    def _submit(self, rung: RefinementStep) -> None:
        self._submission = self._engine.submit(self._order.job(rung))

    async def pictures(self) -> AsyncIterator[Picture]:
        """The pictures of every image as they come; `begin` goes first, and `end` after it.

        Raises:
            ApiError: a later job was refused, or one failed.
        """
        stage = 0
        for number, rung in enumerate(self._order.rungs):
            if number:
                self._submit(rung)
            submission = self._submission
            assert submission is not None
            async for sampled in submission:
                plan, at = rung.plan, stage
                if rung.preview is not None:
                    plan, at = (rung.plan, stage + 1) if sampled.last else (rung.preview, stage)
                final = sampled.last and number == len(self._order.rungs) - 1
                yield Picture(sampled.index, sampled.pixels, plan, at, final, submission.job)
            stage += 1 if rung.preview is None else 2

    def end(self) -> None:
        """Nobody waits any more: what has not begun is not computed. May be called again."""
        if self._holds:
            self._holds = False
            self._engine.release(self._order.model.name)
        if self._submission is not None:
            self._submission.cancel()
