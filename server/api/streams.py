"""A reply of server-sent events that notices when its reader has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would hold events back
    "vary": "accept",
}


class EventStream(Response):
    """Sends what `events` yields. When the client leaves, `events` is closed where it stands; `over` is
    called in the end, whatever happened.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], over: Callable[[], None]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._over = over

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async def forward() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(part()) for part in (forward, left)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            try:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                await self._events.aclose()
            finally:
                self._over()  # a generator that was never begun has no `finally`
