"""Pure ASGI middleware: request ids, the body limit, and the last line against bugs.

`BaseHTTPMiddleware` (`@app.middleware`) costs as much as the rest of a request, and takes the
client's disconnection away from the routes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooLargeError, error_response, internal_error

log = logging.getLogger("dd_server")

_CLIENT_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
# How much of a refused body is read and thrown away, so that a client that sends everything
# before it reads gets to see the reply rather than a reset connection.
_DISCARD_BYTES = 256 * 2**20
_DISCARD_SECONDS = 10.0


class RequestContext:
    """Gives every request an id (`x-request-id`, the client's own if it is well formed) and turns
    an unexpected exception into a clean 500 whose traceback is in the log only.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        scope["state"]["arrived"] = time.perf_counter()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise
            await internal_error()(scope, receive, send_with_id)


class BodyLimit:
    """Reads the body, refusing one of more than `limit` bytes, declared or chunked, with 413."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        length = headers.get("content-length", "")
        if not length and "transfer-encoding" not in headers and not _may_have_body(scope):
            await self.app(scope, receive, send)
            return
        if length.isdigit() and int(length[:20]) > self.limit:
            await self._refuse(scope, receive, send)
            return
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.limit:
                await self._refuse(scope, receive, send)
                return
            chunks.append(chunk)
            if not message.get("more_body", False):
                break
        body: bytes | None = b"".join(chunks)

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = BodyTooLargeError(f"the body is longer than {self.limit} bytes")
        response = error_response(error)
        response.headers["connection"] = "close"

        async def send_open(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "more_body": True}
            await send(message)

        # The reply goes out before the rest of the body is thrown away, and ends after it.
        await response(scope, receive, send_open)
        try:
            await asyncio.wait_for(_discard(receive), _DISCARD_SECONDS)
        except TimeoutError:
            log.info("gave up reading a body that is too large")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _may_have_body(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH")


async def _discard(receive: Receive) -> None:
    size = 0
    while size <= _DISCARD_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
