"""Both kinds of client behind one call, so that every test of one is a test of the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import pytest

from distilled_decoding import AsyncClient, Client


class Asker:
    """Calls with a client of one kind, made for the call: gives what it returns, or all that it yields."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, url: str, call: Callable[[Any], Any], **options: Any) -> Any:
        if self.kind == "asyncio":
            return asyncio.run(self._awaited(url, call, options))
        with Client(url, **options) as client:
            found = call(client)
            return list(found) if isinstance(found, Generator) else found

    async def _awaited(self, url: str, call: Callable[[Any], Any], options: dict[str, Any]) -> Any:
        async with AsyncClient(url, **options) as client:
            found = call(client)
            if isinstance(found, AsyncGenerator):
                return [event async for event in found]
            return await found


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Asker:
    return Asker(request.param)
