"""The errors that the client raises for refusals, broken streams and replies of other servers."""

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
from server import errors as server_errors
from tests.distilled_decoding.fakes import (
    DONE_EVENT,
    IMAGE_EVENT,
    Answer,
    BrokenStream,
    FakeServer,
    refusal,
    stream,
)

PAGE = (Path(__file__).parent.parent.parent / "docs" / "02-http-api.md").read_text(encoding="utf-8")
DOCUMENTED = [(int(s), code) for s, code in re.findall(r"^\|(\d{3})\|`(\w+)`\|", PAGE, re.MULTILINE)]
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


def kind_of(status: int, code: str) -> type[DDClientError]:
    """The class of an error; that of a load, which has no deadline, is the server's."""
    return ServerError if code == "load_timeout" else KINDS[status]


@pytest.mark.parametrize(("status", "code"), DOCUMENTED)
def test_every_documented_status_has_its_class(fake: FakeServer, status: int, code: str) -> None:
    with pytest.raises(DDClientError) as caught:
        fake.call(refusal(status, code, retry_after="7"), retries=0)
    error = caught.value
    assert type(error) is kind_of(status, code)
    found = (error.status, error.code, error.message, error.param, error.request_id, error.retry_after)
    assert found == (status, code, "a message", "field", "abc", 7.0)


def test_an_error_within_a_stream_has_the_class_of_the_reply() -> None:
    """Once a reply has begun, errors of the device and late refusals of the queue are possible."""
    late = {error for error in _all(server_errors.ApiError) if error.status == 429 or error.status >= 500}
    assert len(late) >= 8
    for error in late - {server_errors.CrowdedError, server_errors.LoadTimeoutError}:
        found = error_in_stream(
            f'{{"error": {{"code": "{error.code}", "message": "m", "param": null}}}}', "abc"
        )
        assert (type(found), found.status, found.code) == (KINDS[error.status], error.status, error.code)


def _all(kind: type[server_errors.ApiError]) -> set[type[server_errors.ApiError]]:
    found = {kind}.union(*(_all(child) for child in kind.__subclasses__()))
    return {error for error in found if not error.__name__.startswith("_")}


def test_a_stream_without_its_last_event_broke_off(fake: FakeServer) -> None:
    with pytest.raises(ConnectionFailedError, match="the stream broke off"):
        fake.call(stream(("image", IMAGE_EVENT)), method="stream")


def test_the_error_event_of_a_stream_is_raised(fake: FakeServer) -> None:
    failed = '{"error": {"code": "deadline_exceeded", "message": "too late", "param": "deadline_ms"}}'
    with pytest.raises(DeadlineExceededError, match="too late"):
        fake.call(stream(("image", IMAGE_EVENT), ("error", failed)), method="stream")


def test_a_stream_that_fails_is_closed(fake: FakeServer) -> None:
    """Its connection goes back to the pool."""
    body = BrokenStream(b"event: image\ndata: {}\n\n")
    headers = {"content-type": "text/event-stream"}
    with pytest.raises(InvalidReplyError):
        fake.call(lambda _: httpx2.Response(200, stream=body, headers=headers), method="stream")
    assert body.closed


def test_an_unknown_event_of_a_newer_server_is_ignored(fake: FakeServer) -> None:
    assert (
        len(fake.call(stream(("hint", "{}"), ("image", IMAGE_EVENT), ("done", DONE_EVENT)), method="stream"))
        == 1
    )


@pytest.mark.parametrize(
    ("answer", "method"),
    [
        (lambda _: httpx2.Response(200, text="<html>Welcome</html>"), "generate"),
        (lambda _: httpx2.Response(200, text="<html>Welcome</html>"), "stream"),
        (lambda _: httpx2.Response(200, content=b"x", headers={"content-encoding": "gzip"}), "generate"),
        (lambda _: httpx2.Response(301, headers={"location": "https://host/generate"}), "generate"),
        (stream(("image", "{}")), "stream"),
        (stream(("error", "{}")), "stream"),
    ],
)
def test_a_reply_of_another_server_is_invalid(fake: FakeServer, answer: Answer, method: str) -> None:
    with pytest.raises(InvalidReplyError):
        fake.call(answer, method=method)


@pytest.mark.parametrize(("status", "kind"), [(502, ServerError), (504, ServerError), (418, BadRequestError)])
def test_a_proxys_own_error(fake: FakeServer, status: int, kind: type[DDClientError]) -> None:
    """A proxy's 504 does not mean that `deadline_ms` has passed."""
    with pytest.raises(kind) as caught:
        fake.call(lambda _: httpx2.Response(status, text="<h1>oh\n no</h1>"))
    assert (caught.value.code, caught.value.param) == (f"http_{status}", None)
    assert caught.value.message == "not a reply of this server: <h1>oh no</h1>"
    with pytest.raises(kind) as silent:
        fake.call(lambda _: httpx2.Response(599 if status > 500 else status))
    assert silent.value.message.startswith("not a reply of this server")
