"""Every call: what is sent, and how its answer is read. No I/O, so that both clients share it all.

Fields go out as they are given: the server says what it allows, and a newer one may allow more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from dd_core.errors import InvalidRequestError
from distilled_decoding.contract import DoneEvent, ImageFormat, Priority, Quality
from distilled_decoding.errors import (
    REQUEST_ID,
    ConnectionFailedError,
    InvalidReplyError,
    error_in_stream,
)
from distilled_decoding.results import Generation, ImageEvent, Model, Models

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

MAX_EVENT_BYTES = 64 * 2**20  # a picture in base64: far above any, far below what hurts


class GenerateOptions(TypedDict, total=False):
    """The fields of `POST /generate`. None is the same as left out."""

    label: int | str | None
    prompt: str | None
    model: str | None
    steps: int | None
    quality: Quality | None
    latency_budget_ms: float | None
    min_quality: float | None
    brownout: bool | None
    n: int | None
    seed: int | None
    format: ImageFormat | None
    receipt: str | None
    keep: float | None
    priority: Priority | None
    deadline_ms: float | None


class StreamOptions(GenerateOptions, total=False):
    """The same for a stream; `partial_images` is how many previews an image has at most."""

    partial_images: int | None


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and the reader of its reply."""

    read: Callable[[httpx2.Response], T]
    method: str
    path: str
    body: Mapping[str, Any] | None = None
    accept: str = "application/json"

    @property
    def deadline(self) -> float | None:
        """Seconds from now within which the caller wants the images."""
        deadline_ms = (self.body or {}).get("deadline_ms")
        return None if deadline_ms is None else deadline_ms / 1e3


def http_options(base_url: str, api_key: str | None) -> dict[str, Any]:
    """What httpx2's clients are made with.

    Raises:
        InvalidRequestError: `base_url` is no HTTP address.
    """
    if not base_url.startswith(("http://", "https://")):
        raise InvalidRequestError(
            f"base_url must begin with http:// or https://, not {base_url!r}", param="base_url"
        )
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return {"base_url": base_url, "headers": headers}


def generate(options: Mapping[str, Any]) -> Call[Generation]:
    """`POST /generate` in one piece."""
    return Call(lambda reply: _valid(Generation, reply.content, reply), "POST", "/generate", _given(options))


def stream(options: Mapping[str, Any]) -> Call[EventReader]:
    """`POST /generate` as a stream: the reader takes its events."""
    return Call(EventReader, "POST", "/generate", _given(options), accept="text/event-stream")


def image(receipt: str, image_format: ImageFormat | None) -> Call[bytes]:
    """`GET /images/{receipt}`."""
    query = "" if image_format is None else f"?format={image_format}"
    path = f"/images/{quote(receipt, safe='')}{query}"
    return Call(lambda reply: reply.content, "GET", path, accept="*/*")


def models() -> Call[list[Model]]:
    """`GET /models`."""
    return Call(lambda reply: _valid(Models, reply.content, reply).models, "GET", "/models")


def ready() -> Call[bool]:
    """`GET /readyz`."""
    return Call(lambda reply: reply.is_success, "GET", "/readyz")


class EventReader:
    """Turns the events of a stream into pictures."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self._done = False

    def read(self, event: httpx2.ServerSentEvent) -> Sequence[ImageEvent]:
        """The pictures of an event: one or none. Events of an unknown kind are a newer server's.

        Raises:
            DDClientError: it is the `error` event.
        """
        if event.event == "image":
            return [_valid(ImageEvent, event.data, self._response)]
        if event.event == "error":
            raise error_in_stream(event.data, self._response.headers.get(REQUEST_ID))
        if event.event == "done":
            _valid(DoneEvent, event.data, self._response)
            self._done = True
        return []

    def end(self) -> None:
        """To be called when no more events come.

        Raises:
            ConnectionFailedError: `done` was not among them.
        """
        if not self._done:
            raise ConnectionFailedError(
                "the stream broke off", request_id=self._response.headers.get(REQUEST_ID)
            )


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _valid(model: type[M], data: bytes | str, reply: httpx2.Response) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise InvalidReplyError(
            f"the reply of {reply.url.path} is not this contract's: {error}",
            status=reply.status_code,
            request_id=reply.headers.get(REQUEST_ID),
        ) from None
