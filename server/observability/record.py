"""The record of one request for images: what it is counted and logged as.

It is open from the request's arrival until its reply is made, or its stream ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Self, cast

from starlette.exceptions import HTTPException

from dd_core.errors import DDError
from server import errors
from server.observability.context import Fields, context_of
from server.observability.metrics import Metrics
from server.observability.traffic import UNKNOWN


@dataclass(eq=False)
class RequestRecord:
    """Counts one request in `metrics` and binds its fields to its `context`; a context manager.

    It opens with the request, learns the model and the plan, counts images as they are encoded, and is
    booked once, at the end of the block, with the outcome of what ended it, or when it has `failed`.
    """

    metrics: Metrics
    context: Fields  # see `server.observability.context`
    request_id: str  # of the reply and the log
    arrived: float  # when the request came, on `time.perf_counter`
    log_prompts: bool
    route: str = UNKNOWN

    def __post_init__(self) -> None:
        self.model = self._plan = self._requested_plan = UNKNOWN
        self.admitted = False  # its images wait for a device, or more than that
        self.generates = True  # or it is answered without making anything, and is no request for images
        self._images = 0
        self._open = True
        self.metrics.inflight.inc()

    def choose(self, plan: str, requested_plan: str, prompt: str, **fields: str | int) -> None:
        """Take the names of the plan that is applied and of the one asked for, and fields to log."""
        self._plan, self._requested_plan = plan, requested_plan
        self.context.update(fields)
        if prompt and self.log_prompts:
            self.context["prompt"] = prompt
        if requested_plan != plan:
            self.context["requested_plan"] = requested_plan

    def encoded(
        self, plan: str, image_format: str, images: int, seconds: float, *, streamed: bool, **times: float
    ) -> None:
        """Count images by `plan` that were encoded together in so many seconds and are about to be sent."""
        if streamed and not self._images:
            self.metrics.first_preview.observe(time.perf_counter() - self.arrived)
        self._images += images
        self.metrics.encode_seconds(image_format, seconds)
        self.metrics.encoded(self.model, plan, images)
        self.context.update(times)

    def failed(self, error: BaseException) -> None:
        """Book the request as what `error` is counted as."""
        self._close(outcome_of(error), error)

    def _close(self, outcome: str, error: BaseException | None = None) -> None:
        if not self._open:
            return
        self._open = False
        if error is not None:
            self.metrics.rejected(error)
        self.metrics.inflight.dec()
        if self.admitted and self._requested_plan != self._plan:
            self.metrics.downgraded(self._requested_plan, self._plan)
        self.context.update(model=self.model, plan=self._plan, outcome=outcome)
        if self.generates:
            seconds = time.perf_counter() - self.arrived
            trace_id = cast("str | None", self.context.get("trace_id"))
            self.metrics.request(self.route, self.model, self._plan, outcome, seconds, trace_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._close("ok" if error is None else outcome_of(error), error)


def record_of(scope: MutableMapping[str, Any], metrics: Metrics, log_prompts: bool) -> RequestRecord:
    """Open the record of the request that `scope` belongs to."""
    state, route = scope["state"], scope["route"].path
    return RequestRecord(
        metrics, context_of(scope), state["request_id"], state["arrived"], log_prompts, route
    )


def outcome_of(error: BaseException) -> str:
    """Return the outcome that a refusal, a failure or a client that left is counted as."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "canceled"
    if isinstance(error, (errors.QueueFullError, errors.UnavailableError)):
        return "rejected"
    if isinstance(error, (errors.DeadlineError, errors.DeadlineUnreachableError)):
        return "deadline"
    if isinstance(error, errors.OutOfMemoryError):
        return "oom"
    if isinstance(error, HTTPException) and error.status_code < 500:  # a chunked body that is too long
        return "invalid"
    if not isinstance(error, DDError) or (isinstance(error, errors.ApiError) and error.status >= 500):
        return "error"
    return "invalid"
