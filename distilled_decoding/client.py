"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from time import sleep
from typing import Any, Self, TypeVar, Unpack

import httpx2

from distilled_decoding import calls
from distilled_decoding.calls import MAX_EVENT_BYTES, Call
from distilled_decoding.contract import GenerateOptions, ImageFormat, StreamOptions
from distilled_decoding.errors import DDClientError, error_of, translated
from distilled_decoding.results import Generation, ImageEvent, Model
from distilled_decoding.retries import Attempts

T = TypeVar("T")


class Client:
    """A blocking client of one server. It pools connections: share one among calls and threads, and close it.

    Args:
        base_url: address of the server, with the path under which a proxy serves it, if any.
        api_key: sent as a bearer token, for servers that require keys.
        timeout: seconds for a call with its retries; for a stream, until it starts and between two events.
            It limits silence: a reply that arrives slowly may take longer.
        retries: most retries of a call, on 429, on 503, and where no reply came.
        transport: an httpx2 transport, for instance with a proxy or with certificates.

    Every call may raise a `DDClientError`; the tree of its subclasses is in `distilled_decoding.errors`.

    Raises:
        InvalidURLError: `base_url` is not the address of an HTTP server.
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
        self._limits = timeout, retries
        self._http = httpx2.Client(**calls.http_options(base_url, api_key), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate images of one class, prompt or receipt."""
        return self._answer(calls.generate(options))

    def stream(self, **options: Unpack[StreamOptions]) -> Generator[ImageEvent, None, None]:
        """Generate images with previews: each event is a complete image, better than the one before.

        The request is sent with the first `next`. To stop early, close the generator, as breaking out of
        the loop over it does: the server then cancels the rest.
        """
        call = calls.stream(options)
        with closing(self._open(call)) as response:
            reader = call.read(response)
            with translated():
                for event in httpx2.EventSource(response, MAX_EVENT_BYTES):
                    yield from reader.read(event)
            reader.end()

    def image(
        self,
        receipt: str,
        format: ImageFormat | None = None,  # noqa: A002  # the contract's
        size: str | None = None,
    ) -> bytes:
        """Fetch the file of the image that a receipt names: the same bytes every time.

        Args:
            size: `512x512` or `512`, to which the picture is resampled; left out, the model's own size.
        """
        return self._answer(calls.image(receipt, format, size))

    def models(self) -> list[Model]:
        """Describe the loaded models."""
        return self._answer(calls.models())

    def ready(self) -> bool:
        """True where the server accepts requests now, False also where none answers. Never retries."""
        try:
            return self._answer(calls.ready())
        except calls.NOT_READY:
            return False

    def _answer(self, call: Call[T]) -> T:
        with closing(self._open(call)) as response, translated():
            response.read()
        return call.read(response)

    def _open(self, call: Call[Any]) -> httpx2.Response:
        """Send a call until it succeeds; returns the reply, whose body has not been read."""
        attempts = Attempts(call, *self._limits)
        while True:
            try:
                with translated():
                    response = self._http.send(self._http.build_request(**attempts.request()), stream=True)
                    if response.is_success:
                        return attempts.begun(response)
                    with closing(response):
                        response.read()
                raise error_of(response)
            except DDClientError as error:
                pause = attempts.wait_after(error)
            sleep(pause)
