"""The one place that watches for a client that leaves before it has its reply."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_GENERATING = ("/generate", "/v1/images/", "/images/")


class CancelOnDisconnect:
    """Cancel what runs for a request for images when its client leaves.

    The application behind it reads a body and nothing else: once that is there, a task of its own waits for
    the client to leave, and `receive` ends by being cancelled alone. Requests without a body (GET, HEAD) are
    watched from the start. From the last message of the reply on nobody watches any more.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_GENERATING):
            await self.app(scope, receive, send)
            return
        watched = _Watched(receive, send)
        if scope["method"] in ("GET", "HEAD"):
            watched.watch()
        try:
            await self.app(scope, watched.receive, watched.send)
        except asyncio.CancelledError:
            if not watched.only_left():
                raise
        finally:
            watched.end()


class _Watched:
    """A request that the current task serves."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._request = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._left = False

    def watch(self) -> None:
        """Wait for the client to leave, in a task of its own."""
        self._watcher = asyncio.create_task(self._cancel_when_left())

    async def _cancel_when_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        assert self._request is not None
        self._left = True
        self._request.cancel()

    async def receive(self) -> Message:
        """The next part of the body; behind the last one, or where the client leaves before it, nothing."""
        if self._watcher is None:
            message = await self._receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                self.watch()
            if message["type"] != "http.disconnect":
                return message
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never

    async def send(self, message: Message) -> None:
        """Send a message; behind the last one the client may leave."""
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._stop()
        await self._send(message)

    def only_left(self) -> bool:
        """True where the task is cancelled because the client left, and not by the server's end as well."""
        return self._left and self._request is not None and self._request.cancelling() == 1

    def end(self) -> None:
        """Stop to watch, and take back the request to cancel."""
        self._stop()
        if self._left and self._request is not None:
            self._request.uncancel()

    def _stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
