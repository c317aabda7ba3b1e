"""Both kinds of client behind one call, so that every test of one is a test of the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import pytest

from distilled_decoding import AsyncClient, Client


class Caller:
    """Makes one call with a new client of one kind; returns its result, or the list of what it yields."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, url: str, call: Callable[[Any], Any], **options: Any) -> Any:
        if self.kind == "asyncio":
            return asyncio.run(self._awaited(url, call, options))
        with Client(url, **options) as client:
            result = call(client)
            return list(result) if isinstance(result, Generator) else result

    async def _awaited(self, url: str, call: Callable[[Any], Any], options: dict[str, Any]) -> Any:
        async with AsyncClient(url, **options) as client:
            result = call(client)
            if isinstance(result, AsyncGenerator):
                return [event async for event in result]
            return await result


@pytest.fixture(params=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)
