"""The calls: the request that each one sends, and the reader of its reply.

No I/O, so that the blocking client and the one for asyncio share all of it. Fields are sent as given: the
server validates them, and a newer server may allow more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

import httpx2
from pydantic import BaseModel, ValidationError

from distilled_decoding.contract import MAX_SEED_AS_NUMBER, DoneEvent, ImageFormat
from distilled_decoding.errors import (
    REQUEST_ID,
    ConnectionFailedError,
    InvalidReplyError,
    InvalidURLError,
    OverloadedError,
    error_in_stream,
)
from distilled_decoding.results import Generation, ImageEvent, Model, Models

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

MAX_EVENT_BYTES = 64 * 2**20  # an image in base64: far more than any needs
NOT_READY = (OverloadedError, ConnectionFailedError)


_EVENTS = "text/event-stream"


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and the reader of its reply."""

    read: Callable[[httpx2.Response], T]
    method: str
    path: str
    body: Mapping[str, Any] | None = None
    accept: str = "application/json"
    retried: bool = True

    @property
    def streams(self) -> bool:
        """True if the reply is a stream of events."""
        return self.accept == _EVENTS

    @property
    def deadline(self) -> float:
        """`deadline_ms` in seconds; infinite where it is absent, or no number: the server refuses that."""
        deadline_ms = (self.body or {}).get("deadline_ms")
        return deadline_ms / 1e3 if isinstance(deadline_ms, int | float) else math.inf


def http_options(base_url: str, api_key: str | None) -> dict[str, Any]:
    """Return the arguments with which both of httpx2's clients are constructed.

    Raises:
        InvalidURLError: `base_url` is not the address of an HTTP server.
    """
    try:
        url = httpx2.URL(base_url)
        valid = url.scheme in ("http", "https") and bool(url.host) and not (url.query or url.fragment)
    except httpx2.InvalidURL:
        valid = False
    if not valid:
        raise InvalidURLError(
            f"base_url must be http://host[:port][/path], or the same with https, not {base_url!r}",
            param="base_url",
        )
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return {"base_url": base_url, "headers": headers}


def generate(options: Mapping[str, Any]) -> Call[Generation]:
    """`POST /generate` with one JSON reply."""
    return Call(lambda reply: _valid(Generation, reply), "POST", "/generate", _given(options))


def stream(options: Mapping[str, Any]) -> Call[EventReader]:
    """`POST /generate` with a reply of server-sent events."""
    return Call(EventReader, "POST", "/generate", _given(options), accept=_EVENTS)


def image(receipt: str, image_format: ImageFormat | None, size: str | None) -> Call[bytes]:
    """`GET /images/{receipt}`."""
    query = urlencode({k: v for k, v in (("format", image_format), ("size", size)) if v is not None})
    path = f"/images/{quote(receipt, safe='')}" + (f"?{query}" if query else "")
    return Call(lambda reply: reply.content, "GET", path, accept="*/*")


def models() -> Call[list[Model]]:
    """`GET /models`."""
    return Call(lambda reply: _valid(Models, reply).models, "GET", "/models")


def ready() -> Call[bool]:
    """`GET /readyz`, once; one of `NOT_READY` is raised where the answer is no, or none comes."""
    return Call(lambda reply: reply.is_success, "GET", "/readyz", retried=False)


class EventReader:
    """Parses the events of one stream."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self._done = False

    def read(self, event: httpx2.ServerSentEvent) -> Sequence[ImageEvent]:
        """Parse one event: the image that it carries, if any. Unknown kinds, of a newer server, are ignored.

        Raises:
            DDClientError: it is the `error` event, or does not follow the contract.
        """
        if event.event == "image":
            return [_valid(ImageEvent, self._response, event.data)]
        if event.event == "error":
            raise error_in_stream(event.data, self._response.headers.get(REQUEST_ID))
        if event.event == "done":
            _valid(DoneEvent, self._response, event.data)
            self._done = True
        return []

    def end(self) -> None:
        """Check that the stream, which has ended, is complete.

        Raises:
            ConnectionFailedError: it ended without the `done` event.
        """
        if not self._done:
            raise ConnectionFailedError(
                "the stream broke off", request_id=self._response.headers.get(REQUEST_ID)
            )


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(seed := given.get("seed"), int) and seed > MAX_SEED_AS_NUMBER:
        given["seed"] = str(seed)
    return given


def _valid(model: type[M], reply: httpx2.Response, event: str | None = None) -> M:
    try:
        return model.model_validate_json(reply.content if event is None else event)
    except ValidationError as error:
        raise InvalidReplyError(
            f"the reply of {reply.url.path} does not follow the contract: {error}",
            status=reply.status_code,
            request_id=reply.headers.get(REQUEST_ID),
        ) from None
