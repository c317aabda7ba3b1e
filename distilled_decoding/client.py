"""The client for ordinary code: each call returns when it is answered."""

from __future__ import annotations

from collections.abc import Generator
from time import sleep
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from distilled_decoding import calls
from distilled_decoding.calls import MAX_EVENT_BYTES, Call, GenerateOptions, StreamOptions
from distilled_decoding.contract import ImageFormat
from distilled_decoding.errors import (
    ConnectionFailedError,
    DDClientError,
    OverloadedError,
    error_of,
    translated,
)
from distilled_decoding.results import Generation, ImageEvent, Model
from distilled_decoding.retries import Attempts, Limits

T = TypeVar("T")


class Client:
    """A server's client. It keeps its connections: use one for many calls, from any threads, and close it.

    Args:
        base_url: of the server.
        api_key: where the server asks for one.
        timeout: seconds for a call with its retries; of a stream, to its beginning and between two events.
            Silence is what is timed: a reply that trickles in may take longer.
        retries: how often a call is repeated on 429, on 503, and where no reply came.
        transport: httpx2's, for proxies and certificates of your own.

    Every call may raise a `DDClientError`: `distilled_decoding.errors` draws the tree.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        *,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._limits = Limits(timeout, retries)
        self._http = httpx2.Client(**calls.http_options(base_url, api_key), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """Images of one class, prompt or receipt."""
        return self._answer(calls.generate(options))

    def stream(self, **options: Unpack[StreamOptions]) -> Generator[ImageEvent, None, None]:
        """Pictures as they come, each better than the last; an image's `final` one is its last.

        The request is sent when the first is asked for. To leave early, close the generator (breaking out
        of the loop over it does): the server then computes no more.
        """
        call = calls.stream(options)
        response = self._open(call)
        try:
            reader = call.read(response)
            with translated():
                for event in httpx2.EventSource(response, MAX_EVENT_BYTES):
                    yield from reader.read(event)
            reader.end()
        finally:
            response.close()

    def image(self, receipt: str, format: ImageFormat | None = None) -> bytes:  # noqa: A002  # the contract's
        """The file of the image that a receipt names: the same bytes every time."""
        return self._answer(calls.image(receipt, format))

    def models(self) -> list[Model]:
        """What is loaded."""
        return self._answer(calls.models())

    def ready(self) -> bool:
        """Whether the server takes requests now; False as well where none answers. Asks once."""
        try:
            return self._answer(calls.ready(), Limits(self._limits.timeout, retries=0))
        except (OverloadedError, ConnectionFailedError):
            return False

    def _answer(self, call: Call[T], limits: Limits | None = None) -> T:
        response = self._open(call, limits)
        try:
            with translated():
                response.read()
        finally:
            response.close()
        return call.read(response)

    def _open(self, call: Call[Any], limits: Limits | None = None) -> httpx2.Response:
        """The successful reply to a call, whose body is still to be read."""
        attempts = Attempts(call, limits or self._limits)
        while True:
            try:
                with translated():
                    response = self._http.send(self._http.build_request(**attempts.request()), stream=True)
                    if response.is_success:
                        return response
                    try:
                        response.read()
                    finally:
                        response.close()
                raise error_of(response)
            except DDClientError as error:
                pause = attempts.wait_after(error)
            sleep(pause)
