"""The client for asyncio."""

from __future__ import annotations

from asyncio import sleep
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Self, TypeVar, Unpack

import httpx2

from distilled_decoding import calls
from distilled_decoding.calls import MAX_EVENT_BYTES, Call
from distilled_decoding.contract import GenerateOptions, ImageFormat, StreamOptions
from distilled_decoding.errors import DDClientError, error_of, translated
from distilled_decoding.results import Generation, ImageEvent, Model
from distilled_decoding.retries import Attempts

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same arguments, calls and errors. Share one among concurrent calls."""

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        *,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._limits = timeout, retries
        self._http = httpx2.AsyncClient(**calls.http_options(base_url, api_key), transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(self, **options: Unpack[GenerateOptions]) -> Generation:
        """See `Client.generate`."""
        return await self._answer(calls.generate(options))

    async def stream(self, **options: Unpack[StreamOptions]) -> AsyncGenerator[ImageEvent, None]:
        """See `Client.stream`. To stop early, wrap it in `contextlib.aclosing`."""
        call = calls.stream(options)
        async with aclosing(await self._open(call)) as response:
            reader = call.read(response)
            with translated():
                async for event in httpx2.EventSource(response, MAX_EVENT_BYTES):
                    for picture in reader.read(event):
                        yield picture
            reader.end()

    async def image(
        self,
        receipt: str,
        format: ImageFormat | None = None,  # noqa: A002
        size: str | None = None,
    ) -> bytes:
        """See `Client.image`."""
        return await self._answer(calls.image(receipt, format, size))

    async def models(self) -> list[Model]:
        """See `Client.models`."""
        return await self._answer(calls.models())

    async def ready(self) -> bool:
        """See `Client.ready`."""
        try:
            return await self._answer(calls.ready())
        except calls.NOT_READY:
            return False

    async def _answer(self, call: Call[T]) -> T:
        async with aclosing(await self._open(call)) as response:
            with translated():
                await response.aread()
        return call.read(response)

    async def _open(self, call: Call[Any]) -> httpx2.Response:
        attempts = Attempts(call, *self._limits)
        while True:
            try:
                with translated():
                    request = self._http.build_request(**attempts.request())
                    response = await self._http.send(request, stream=True)
                    if response.is_success:
                        return attempts.begun(response)
                    async with aclosing(response):
                        await response.aread()
                raise error_of(response)
            except DDClientError as error:
                pause = attempts.wait_after(error)
            await sleep(pause)
