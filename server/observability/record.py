"""What a request for images is counted and logged under, from its arrival to its last byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from dd_core.errors import DDError
from server.errors import (
    ApiError,
    DeadlineError,
    DeadlineUnreachableError,
    DrainingError,
    OutOfMemoryError,
    QueueFullError,
    UnavailableError,
)
from server.generation.request import Order
from server.observability.context import bind
from server.observability.metrics import UNKNOWN
from server.state import Phase, ServerState


class RequestRecord:
    """One request; `close` books it, once."""

    def __init__(self, request: Request, state: ServerState) -> None:
        self.arrived: float = request.state.arrived
        self.outcome = "error"
        self.open = True
        self.lasting = False  # a stream goes on after the route has returned, and closes it itself
        self._request = request
        self._state = state
        self._pictures = 0
        self._model = UNKNOWN
        self._plan = UNKNOWN
        state.metrics.inflight.inc()

    def addressed(self, model: str) -> None:
        """The model is known."""
        self._model = model

    def ordered(self, order: Order) -> None:
        """The plan is known."""
        self._plan = order.plan.name
        bind(self._request, steps=order.plan.cost, n=len(order.keys))
        if self._state.settings.log_prompts and isinstance(order.condition, str):
            bind(self._request, prompt=order.condition)
        requested = order.choice.requested.plan.name
        if requested != self._plan:
            bind(self._request, requested_plan=requested)

    def admitted(self, order: Order) -> None:
        """It is in the queue."""
        requested = order.choice.requested.plan.name
        if requested != self._plan:
            self._state.metrics.downgraded(requested, self._plan)

    def delivered(self, plan: str, images: int) -> None:
        """Pictures by a plan are about to be sent."""
        self._state.metrics.delivered(self._model, plan, images)

    def pictured(self, plan: str, image_format: str, seconds: float) -> None:
        """One picture of a stream was encoded in so many seconds, and is about to be sent."""
        if not self._pictures:
            self._state.metrics.first_preview.observe(time.perf_counter() - self.arrived)
        self._pictures += 1
        self._state.metrics.encode[image_format].observe(seconds)
        self.delivered(plan, 1)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Takes the outcome from what happens inside; what is raised goes on."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit) as error:
            draining = self._state.phase is Phase.DRAINING
            self.outcome = "rejected" if draining else "canceled"
            # A generator that is being closed may not say anything more.
            if not draining or isinstance(error, GeneratorExit):
                raise
            raise DrainingError("the server shut down before this was done", retry_after=1) from None
        except DDError as error:
            self.outcome = outcome_of(error)
            raise

    def close(self) -> None:
        """The request has ended."""
        if not self.open:
            return
        self.open = False
        self._state.metrics.inflight.dec()
        bind(self._request, model=self._model, plan=self._plan, outcome=self.outcome)
        seconds = time.perf_counter() - self.arrived
        self._state.metrics.request(self._model, self._plan, self.outcome, seconds)


@contextmanager
def open_record(request: Request, state: ServerState) -> Iterator[RequestRecord]:
    """The account of a request, closed at the end of the block unless it is `lasting`."""
    account = RequestRecord(request, state)
    try:
        with account.watched():
            yield account
    except BaseException:
        account.lasting = False
        raise
    finally:
        if not account.lasting:
            account.close()


def outcome_of(error: DDError) -> str:
    """The outcome that a refusal or failure is counted as."""
    if isinstance(error, (QueueFullError, UnavailableError)):
        return "rejected"
    if isinstance(error, (DeadlineError, DeadlineUnreachableError)):
        return "deadline"
    if isinstance(error, OutOfMemoryError):
        return "oom"
    return "error" if isinstance(error, ApiError) and error.status >= 500 else "invalid"
