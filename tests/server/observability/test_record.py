"""The record of a request: booked once, as what ended it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext

import pytest
from starlette.exceptions import HTTPException

from server.errors import DeadlineError, DrainingError, OutOfMemoryError, QueueFullError, UnknownModelError
from server.observability.context import Fields
from server.observability.metrics import OUTCOMES, Metrics
from server.observability.record import RequestRecord


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def record(metrics: Metrics, context: Fields | None = None, *, log_prompts: bool = False) -> RequestRecord:
    found: Fields = {} if context is None else context
    return RequestRecord(metrics, found, "r", 0.0, log_prompts=log_prompts, route="/generate")


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def requests(metrics: Metrics, **labels: str) -> float:
    return value(metrics, "dd_requests_total", route="/generate", **labels)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (UnknownModelError("none"), "invalid"),
        (QueueFullError("full", retry_after=1), "rejected"),
        (DrainingError("over", retry_after=1), "rejected"),
        (DeadlineError("late"), "deadline"),
        (HTTPException(413), "invalid"),  # Starlette's, of a chunked body that is too long
        (HTTPException(500), "error"),
        (asyncio.CancelledError(), "canceled"),
        (GeneratorExit(), "canceled"),
        (OutOfMemoryError("full"), "oom"),
        (ZeroDivisionError(), "error"),
    ],
)
def test_the_outcome_is_that_of_what_ends_the_block(
    metrics: Metrics, error: BaseException | None, outcome: str
) -> None:
    context: Fields = {}
    expected = pytest.raises(type(error)) if error is not None else nullcontext()
    with expected, record(metrics, context) as opened:
        assert value(metrics, "dd_inflight_requests") == 1
        opened.model = "tiny"
        opened.choose("dd-1", "dd-2", prompt="", steps=1)
        if error is not None:
            raise error
    assert context == {
        "model": "tiny", "plan": "dd-1", "requested_plan": "dd-2", "steps": 1, "outcome": outcome
    }  # fmt: skip
    assert value(metrics, "dd_inflight_requests") == 0
    counted = {o: requests(metrics, model="tiny", plan="dd-1", outcome=o) for o in OUTCOMES}
    assert counted == {**dict.fromkeys(OUTCOMES, 0.0), outcome: 1.0}


def test_it_is_booked_once(metrics: Metrics) -> None:
    """A stream that failed sends its error, and then its block ends well."""
    with record(metrics) as opened:
        opened.failed(QueueFullError("full", retry_after=1))
    assert value(metrics, "dd_rejects_total", reason="queue_full") == 1
    with record(metrics) as opened:
        opened.failed(DeadlineError("late"))
    assert requests(metrics, model="none", plan="none", outcome="deadline") == 1
    assert requests(metrics, model="none", plan="none", outcome="ok") == 0
    assert value(metrics, "dd_inflight_requests") == 0


@pytest.mark.parametrize("admitted", [True, False])
def test_a_cheaper_plan_counts_only_where_its_images_were_admitted(metrics: Metrics, admitted: bool) -> None:
    with record(metrics) as opened:
        opened.choose("dd-1", "teacher", prompt="")
        opened.admitted = admitted
    assert value(metrics, "dd_plan_downgrades_total", requested="teacher", applied="dd-1") == admitted


@pytest.mark.parametrize("log_prompts", [True, False])
def test_a_prompt_is_bound_only_where_the_operator_wants_it(metrics: Metrics, log_prompts: bool) -> None:
    context: Fields = {}
    with record(metrics, context, log_prompts=log_prompts) as opened:
        opened.choose("dd-1", "dd-1", prompt="a red heart")
    assert context.get("prompt") == ("a red heart" if log_prompts else None)


def test_the_first_image_of_a_stream_is_timed_alone(metrics: Metrics) -> None:
    with record(metrics) as opened:
        for _ in range(3):
            opened.encoded("dd-1", "png", 2, 0.01, streamed=True, queue_ms=1.5)
    assert value(metrics, "dd_time_to_first_preview_seconds_count") == 1
    assert value(metrics, "dd_images_total", model="none", plan="dd-1") == 6
    assert value(metrics, "dd_encode_seconds_count", format="png") == 3


def test_what_made_nothing_is_no_request_for_images(metrics: Metrics) -> None:
    """A 304 of `/images` took no time of the device, and would make the latencies look better."""
    with record(metrics) as opened:
        opened.generates = False
    assert requests(metrics, model="none", plan="none", outcome="ok") == 0
    assert value(metrics, "dd_inflight_requests") == 0
