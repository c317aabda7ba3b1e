"""The client for asyncio."""

from __future__ import annotations

from asyncio import sleep
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from distilled_decoding import calls
from distilled_decoding.calls import MAX_EVENT_BYTES, Call
from distilled_decoding.contract import GenerateOptions, ImageFormat, StreamOptions
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
        self._limits = Limits(timeout, retries)
        self._http = httpx2.AsyncClient(**calls.http_options(base_url, api_key), transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        response = await self._open(call)
        try:
            reader = call.read(response)
            with translated():
                async for event in httpx2.EventSource(response, MAX_EVENT_BYTES):
                    for picture in reader.read(event):
                        yield picture
            reader.end()
        finally:
            await response.aclose()

    async def image(self, receipt: str, format: ImageFormat | None = None) -> bytes:  # noqa: A002
        """See `Client.image`."""
        return await self._answer(calls.image(receipt, format))

    async def models(self) -> list[Model]:
        """See `Client.models`."""
        return await self._answer(calls.models())

    async def ready(self) -> bool:
        """See `Client.ready`."""
        try:
            return await self._answer(calls.ready(), Limits(self._limits.timeout, retries=0))
        except (OverloadedError, ConnectionFailedError):
            return False

    async def _answer(self, call: Call[T], limits: Limits | None = None) -> T:
        response = await self._open(call, limits)
        try:
            with translated():
                await response.aread()
        finally:
            await response.aclose()
        return call.read(response)

    async def _open(self, call: Call[Any], limits: Limits | None = None) -> httpx2.Response:
        attempts = Attempts(call, limits or self._limits)
        while True:
            try:
                with translated():
                    request = self._http.build_request(**attempts.request())
                    response = await self._http.send(request, stream=True)
                    if response.is_success:
                        return response
                    try:
                        await response.aread()
                    finally:
                        await response.aclose()
                raise error_of(response)
            except DDClientError as error:
                pause = attempts.wait_after(error)
            await sleep(pause)
