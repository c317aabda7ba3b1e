"""When the client retries, and how long it waits first."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest

from distilled_decoding import (
    ConnectionFailedError,
    DDClientError,
    Generation,
    NotFoundError,
    OverloadedError,
    TimedOutError,
    retries,
)
from tests.distilled_decoding.fakes import (
    DONE_EVENT,
    IMAGE_EVENT,
    BrokenStream,
    FakeServer,
    broken,
    refusal,
    stream,
    success,
)


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_retried_after_the_time_that_it_asks_for(fake: FakeServer, status: int) -> None:
    made = fake.call(refusal(status, retry_after="4"), success)
    assert isinstance(made, Generation) and made.images[0].bytes == b"a picture"
    assert fake.waits == [4.2]  # up to a tenth more at random: here half of that
    assert fake.bodies == [{"label": 1}] * 2


def test_a_retry_after_that_is_a_date(fake: FakeServer) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    fake.call(
        refusal(503, retry_after=soon),
        refusal(503, retry_after=past),
        refusal(503, retry_after="soon"),
        success,
    )
    assert 18.0 < fake.waits[0] <= 21.0
    assert fake.waits[1:] == [0.375, 0.75]  # the second and the third of the back-off


def test_the_back_off_is_exponential_and_the_retries_are_limited(fake: FakeServer) -> None:
    with pytest.raises(OverloadedError) as caught:
        fake.call(*[refusal(503)] * 9, retries=8, timeout=100.0)
    assert caught.value.retry_after is None
    assert fake.waits == [0.1875, 0.375, 0.75, 1.5, 3.0, 6.0, 6.0, 6.0]
    assert len(fake.requests) == 9


@pytest.mark.parametrize(
    "kind", [httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ReadError, httpx2.RemoteProtocolError]
)
def test_a_request_without_a_reply_is_retried(fake: FakeServer, kind: type[httpx2.TransportError]) -> None:
    assert fake.call(broken(kind), success).seed == 7
    assert len(fake.waits) == 1
    with pytest.raises(ConnectionFailedError, match="no reply from host: it broke") as caught:
        fake.call(broken(kind), retries=0)
    assert (caught.value.status, caught.value.code) == (None, "connection_failed")


@pytest.mark.parametrize("status", [400, 401, 404, 405, 406, 408, 409, 413, 415, 431, 500, 504])
def test_other_errors_are_not_retried(fake: FakeServer, status: int) -> None:
    with pytest.raises(DDClientError):
        fake.call(refusal(status, retry_after="1"))
    assert (len(fake.requests), fake.waits) == (1, [])


def test_a_timeout_is_not_retried(fake: FakeServer) -> None:
    with pytest.raises(TimedOutError):
        fake.call(broken(httpx2.ReadTimeout))
    assert len(fake.requests) == 1


def test_all_attempts_share_the_timeout(fake: FakeServer) -> None:
    fake.latency = 10.0
    with pytest.raises(OverloadedError):
        fake.call(*[refusal(503, retry_after="2")] * 3, timeout=25.0, retries=9)
    limits = [request.extensions["timeout"] for request in fake.requests]
    assert [limit["read"] for limit in limits] == pytest.approx([25.0, 25.0 - 12.1, 25.0 - 24.2])
    assert [limit["connect"] for limit in limits] == pytest.approx([5.0, 5.0, 0.8])


def test_a_wait_beyond_the_timeout_is_not_begun(fake: FakeServer) -> None:
    with pytest.raises(OverloadedError) as caught:
        fake.call(refusal(429, retry_after="30"), timeout=20.0)
    assert (caught.value.retry_after, fake.waits) == (30.0, [])


def test_a_deadline_bounds_the_attempts_and_a_retry_sends_what_is_left(fake: FakeServer) -> None:
    """The server counts the deadline from arrival, the caller from the call."""
    refused = refusal(503, "deadline_unreachable", retry_after="2")
    fake.call(refused, success, arguments={"label": 1, "deadline_ms": 5000})
    assert [body["deadline_ms"] for body in fake.bodies] == [5000, pytest.approx(2900)]
    with pytest.raises(OverloadedError):
        fake.call(refused, arguments={"label": 1, "deadline_ms": 2000})
    assert (len(fake.requests), len(fake.waits)) == (3, 1)


def test_arguments_that_are_none_are_not_sent(fake: FakeServer) -> None:
    fake.call(success, arguments={"label": 0, "seed": None, "brownout": False})
    assert fake.bodies == [{"label": 0, "brownout": False}]


def test_ready_never_retries(fake: FakeServer) -> None:
    assert fake.call(refusal(503, "not_ready", retry_after="1"), method="ready", arguments={}) is False
    assert (len(fake.requests), fake.waits) == (1, [])
    with pytest.raises(NotFoundError):  # another server
        fake.call(refusal(404), method="ready", arguments={})


def test_a_stream_is_retried_before_it_begins(fake: FakeServer) -> None:
    [event] = fake.call(
        refusal(429, retry_after="1"), stream(("image", IMAGE_EVENT), ("done", DONE_EVENT)), method="stream"
    )
    assert event.image.bytes == b"a picture"
    assert [request.headers["accept"] for request in fake.requests] == ["text/event-stream"] * 2


def test_a_stream_that_was_retried_has_the_whole_time_between_two_events(fake: FakeServer) -> None:
    """The server says something every ten seconds: what the attempts have left would be too short."""
    answers = stream(("image", IMAGE_EVENT), ("done", DONE_EVENT))
    fake.call(refusal(503, retry_after="20"), answers, method="stream", timeout=30.0)
    last = fake.requests[-1].extensions["timeout"]
    assert last["read"] == 30.0 and last["connect"] == retries.CONNECT
    fake.call(refusal(503, retry_after="20"), success, timeout=30.0)
    assert fake.requests[-1].extensions["timeout"]["read"] == 9.0  # 20 s, and a tenth of half of them, waited


@pytest.mark.parametrize("start", [b"", b"event: image\n", f"event: image\ndata: {IMAGE_EVENT}\n\n".encode()])
def test_a_reply_that_has_begun_is_not_retried(fake: FakeServer, start: bytes) -> None:
    headers = {"content-type": "text/event-stream"}
    with pytest.raises(ConnectionFailedError, match="it broke"):
        fake.call(
            lambda _: httpx2.Response(200, stream=BrokenStream(start), headers=headers), method="stream"
        )
    with pytest.raises(ConnectionFailedError, match="it broke"):
        fake.call(lambda _: httpx2.Response(200, stream=BrokenStream(b"{")))
    assert (len(fake.requests), fake.waits) == (2, [])
