"""When the client asks again, and how long it waits. No socket, and no time passes."""

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
)
from tests.distilled_decoding.fakes import DONE, PICTURE, Snapping, World, broken, refusal, stream, success


@pytest.mark.parametrize("status", [429, 503])
def test_it_comes_again_when_it_is_told_to(world: World, status: int) -> None:
    made = world.call(refusal(status, retry_after="4"), success)
    assert isinstance(made, Generation) and made.images[0].bytes == b"a picture"
    assert world.waits == [4.2]  # and a tenth of it at most, half of which was drawn
    assert world.bodies == [{"label": 1}] * 2


def test_a_retry_after_that_is_a_date(world: World) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    world.call(
        refusal(503, retry_after=soon),
        refusal(503, retry_after=past),
        refusal(503, retry_after="soon"),
        success,
    )
    assert 18.0 < world.waits[0] <= 21.0
    assert world.waits[1:] == [0.375, 0.75]  # the back-off's second and third


def test_left_to_itself_it_backs_off_and_then_gives_up(world: World) -> None:
    with pytest.raises(OverloadedError) as caught:
        world.call(*[refusal(503)] * 9, retries=8, timeout=100.0)
    assert caught.value.retry_after is None
    assert world.waits == [0.1875, 0.375, 0.75, 1.5, 3.0, 6.0, 6.0, 6.0]
    assert len(world.requests) == 9


@pytest.mark.parametrize(
    "kind", [httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ReadError, httpx2.RemoteProtocolError]
)
def test_what_got_no_reply_is_asked_again(world: World, kind: type[httpx2.TransportError]) -> None:
    assert world.call(broken(kind), success).seed == 7
    assert len(world.waits) == 1
    with pytest.raises(ConnectionFailedError, match="no reply from host: it broke") as caught:
        world.call(broken(kind), retries=0)
    assert (caught.value.status, caught.value.code) == (None, "connection_failed")


@pytest.mark.parametrize("status", [400, 401, 404, 405, 406, 408, 409, 413, 415, 431, 500, 504])
def test_what_would_fail_again_is_asked_once(world: World, status: int) -> None:
    with pytest.raises(DDClientError):
        world.call(refusal(status, retry_after="1"))
    assert (len(world.requests), world.waits) == (1, [])


def test_time_that_is_up_is_not_begun_anew(world: World) -> None:
    with pytest.raises(TimedOutError):
        world.call(broken(httpx2.ReadTimeout))
    assert len(world.requests) == 1


def test_all_attempts_share_the_timeout(world: World) -> None:
    world.takes = 10.0
    with pytest.raises(OverloadedError):
        world.call(*[refusal(503, retry_after="2")] * 3, timeout=25.0, retries=9)
    limits = [request.extensions["timeout"] for request in world.requests]
    assert [limit["read"] for limit in limits] == pytest.approx([25.0, 25.0 - 12.1, 25.0 - 24.2])
    assert [limit["connect"] for limit in limits] == pytest.approx([5.0, 5.0, 0.8])


def test_a_wait_that_does_not_fit_is_not_begun(world: World) -> None:
    with pytest.raises(OverloadedError) as caught:
        world.call(refusal(429, retry_after="30"), timeout=20.0)
    assert (caught.value.retry_after, world.waits) == (30.0, [])


def test_a_deadline_bounds_the_attempts_and_shrinks(world: World) -> None:
    """The server counts it from a request's arrival; the caller means from the call."""
    refused = refusal(503, "deadline_unreachable", retry_after="2")
    world.call(refused, success, wish={"label": 1, "deadline_ms": 5000})
    assert [body["deadline_ms"] for body in world.bodies] == [5000, pytest.approx(2900)]
    with pytest.raises(OverloadedError):
        world.call(refused, wish={"label": 1, "deadline_ms": 2000})
    assert (len(world.requests), len(world.waits)) == (3, 1)


def test_nothing_is_sent_for_what_is_none(world: World) -> None:
    world.call(success, wish={"label": 0, "seed": None, "brownout": False})
    assert world.bodies == [{"label": 0, "brownout": False}]


def test_ready_asks_once(world: World) -> None:
    assert world.call(refusal(503, "not_ready", retry_after="1"), how="ready", wish={}) is False
    assert (len(world.requests), world.waits) == (1, [])
    with pytest.raises(NotFoundError):  # something else answers there
        world.call(refusal(404), how="ready", wish={})


def test_a_stream_is_begun_again(world: World) -> None:
    [event] = world.call(
        refusal(429, retry_after="1"), stream(("image", PICTURE), ("done", DONE)), how="stream"
    )
    assert event.image.bytes == b"a picture"
    assert [request.headers["accept"] for request in world.requests] == ["text/event-stream"] * 2


@pytest.mark.parametrize("begun", [b"", b"event: image\n", f"event: image\ndata: {PICTURE}\n\n".encode()])
def test_a_reply_that_has_begun_is_not(world: World, begun: bytes) -> None:
    headers = {"content-type": "text/event-stream"}
    with pytest.raises(ConnectionFailedError, match="it broke"):
        world.call(lambda _: httpx2.Response(200, stream=Snapping(begun), headers=headers), how="stream")
    with pytest.raises(ConnectionFailedError, match="it broke"):
        world.call(lambda _: httpx2.Response(200, stream=Snapping(b"{")))
    assert (len(world.requests), world.waits) == (2, [])
