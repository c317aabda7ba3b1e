"""What the client makes of refusals, of streams that go wrong, and of what is not this server."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
import pytest

from distilled_decoding import (
    BadRequestError,
    ConflictError,
    ConnectionFailedError,
    DDClientError,
    DeadlineExceededError,
    InvalidReplyError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnauthorizedError,
)
from distilled_decoding.errors import error_in_stream
from server import errors as answers
from tests.distilled_decoding.fakes import DONE, PICTURE, Answer, Snapping, World, refusal, stream

PAGE = (Path(__file__).parent.parent.parent / "docs" / "02-http-api.md").read_text(encoding="utf-8")
DOCUMENTED = [(int(s), code) for s, code in re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE, re.MULTILINE)]
KINDS: dict[int, type[DDClientError]] = {
    **dict.fromkeys((400, 405, 406, 408, 413, 415, 431), BadRequestError),
    401: UnauthorizedError,
    404: NotFoundError,
    409: ConflictError,
    429: OverloadedError,
    500: ServerError,
    503: OverloadedError,
    504: DeadlineExceededError,
}


@pytest.mark.parametrize(("status", "code"), DOCUMENTED)
def test_every_documented_status_has_its_class(world: World, status: int, code: str) -> None:
    with pytest.raises(DDClientError) as caught:
        world.call(refusal(status, code, retry_after="7"), retries=0)
    error = caught.value
    assert type(error) is KINDS[status]
    found = (error.status, error.code, error.message, error.param, error.request_id, error.retry_after)
    assert found == (status, code, "a message", "field", "abc", 7.0)


def test_within_a_stream_an_error_is_what_it_is_as_a_reply() -> None:
    """All that can happen once a reply has begun: what is the device's, and what the queue refuses later."""
    late = {error for error in _all(answers.ApiError) if error.status == 429 or error.status >= 500}
    assert len(late) >= 8
    for error in late - {answers.CrowdedError}:
        found = error_in_stream(
            f'{{"error": {{"code": "{error.code}", "message": "m", "param": null}}}}', "abc"
        )
        assert (type(found), found.status, found.code) == (KINDS[error.status], error.status, error.code)


def _all(kind: type[answers.ApiError]) -> set[type[answers.ApiError]]:
    found = {kind}.union(*(_all(child) for child in kind.__subclasses__()))
    return {error for error in found if not error.__name__.startswith("_")}


def test_a_stream_that_ends_without_saying_so_broke_off(world: World) -> None:
    with pytest.raises(ConnectionFailedError, match="the stream broke off"):
        world.call(stream(("image", PICTURE)), how="stream")


def test_the_error_of_a_stream_is_raised(world: World) -> None:
    failed = '{"error": {"code": "deadline_exceeded", "message": "too late", "param": "deadline_ms"}}'
    with pytest.raises(DeadlineExceededError, match="too late"):
        world.call(stream(("image", PICTURE), ("error", failed)), how="stream")


def test_a_stream_that_fails_is_closed(world: World) -> None:
    """Or its connection would be lost to the calls that come after."""
    body = Snapping(b"event: image\ndata: {}\n\n")
    headers = {"content-type": "text/event-stream"}
    with pytest.raises(InvalidReplyError):
        world.call(lambda _: httpx2.Response(200, stream=body, headers=headers), how="stream")
    assert body.closed


def test_an_event_of_a_newer_server_is_passed_over(world: World) -> None:
    assert len(world.call(stream(("hint", "{}"), ("image", PICTURE), ("done", DONE)), how="stream")) == 1


@pytest.mark.parametrize(
    ("answer", "how"),
    [
        (lambda _: httpx2.Response(200, text="<html>Welcome</html>"), "generate"),
        (lambda _: httpx2.Response(200, text="<html>Welcome</html>"), "stream"),
        (lambda _: httpx2.Response(200, content=b"x", headers={"content-encoding": "gzip"}), "generate"),
        (lambda _: httpx2.Response(301, headers={"location": "https://host/generate"}), "generate"),
        (stream(("image", "{}")), "stream"),
        (stream(("error", "{}")), "stream"),
    ],
)
def test_what_is_not_this_server_is_said_to_be_so(world: World, answer: Answer, how: str) -> None:
    with pytest.raises(InvalidReplyError):
        world.call(answer, how=how)


@pytest.mark.parametrize(("status", "kind"), [(502, ServerError), (504, ServerError), (418, BadRequestError)])
def test_a_proxys_own_error(world: World, status: int, kind: type[DDClientError]) -> None:
    """Its 504 is no deadline of ours."""
    with pytest.raises(kind) as caught:
        world.call(lambda _: httpx2.Response(status, text="<h1>oh\n no</h1>"))
    assert (caught.value.code, caught.value.param) == (f"http_{status}", None)
    assert caught.value.message == "not a reply of this server: <h1>oh no</h1>"
    with pytest.raises(kind) as silent:
        world.call(lambda _: httpx2.Response(599 if status > 500 else status))
    assert silent.value.message.startswith("not a reply of this server")
