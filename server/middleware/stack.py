"""Pure ASGI middleware.

From the outside in:

    (tracing)        a span (`server.observability.tracing`)
    RequestContext   an id for the request, and its log line (`server.observability.logs`)
    Cors             preflights, and what other pages may read (`server.middleware.cors`)
    LastResort       a bug becomes a clean 500
    RequireKey       401 (`server.middleware.auth`)
    SizeLimits       431, 413
    Direct           the busiest endpoints, without the router
    the routes

`BaseHTTPMiddleware` (`@app.middleware`) costs as much as the rest of a request, and takes the
client's disconnection away from the routes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dd_core.errors import InvalidRequestError
from server.errors import ApiError, BodyTooLargeError, HeadTooLargeError, error_response, internal_error
from server.middleware.auth import RequireKey, read_keys
from server.middleware.cors import Cors
from server.observability.logs import CLIENT_LEFT, log_request, shown_path
from server.observability.tracing import add_tracing, make_provider
from server.settings import Settings

log = logging.getLogger("dd_server")

_CLIENT_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
# How much of a refused body is read and thrown away, so that a client that sends everything
# before it reads gets to see the reply rather than a reset connection.
_DISCARD_BYTES = 256 * 2**20
_DISCARD_SECONDS = 10.0


def install_middleware(app: FastAPI, settings: Settings, direct: Sequence[Route] = ()) -> None:
    """Put the middleware around `app`.

    Args:
        direct: see `Direct`.

    Raises:
        InvalidRequestError: a file of keys cannot be used, or tracing is not installed.
    """
    api_keys, admin_keys = read_keys(settings)
    # The last one added is the outermost.
    app.add_middleware(Direct, routes=direct)
    app.add_middleware(SizeLimits, head=settings.max_header_bytes, body=settings.max_body_bytes)
    app.add_middleware(RequireKey, api_keys=api_keys, admin_keys=admin_keys)
    app.add_middleware(LastResort)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(RequestContext, access_log=settings.access_log)
    if settings.otel_endpoint:
        add_tracing(app, make_provider(settings.otel_endpoint))


class RequestContext:
    """Gives every request an id (`x-request-id`, the client's own if it is well formed) and, with
    `access_log`, a line in the log when it has ended.
    """

    def __init__(self, app: ASGIApp, access_log: bool) -> None:
        self.app = app
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["arrived"] = time.perf_counter()
        status, sent = CLIENT_LEFT, 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                identified = (b"x-request-id", request_id.encode("ascii"))
                message = {**message, "headers": [*message["headers"], identified]}
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            if self.access_log:
                log_request(scope, status, sent)


class LastResort:
    """Turns an unexpected exception into a clean 500 whose traceback is in the log only."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            request_id = scope["state"]["request_id"]
            log.exception(
                "request %s: %s %s failed",
                request_id,
                scope["method"],
                shown_path(scope["path"]),
                extra={"fields": {"request_id": request_id}, "said": {"request_id"}},
            )
            if started:
                raise
            await internal_error()(scope, receive, send)


class SizeLimits:
    """Refuses a head of more than `head` bytes with 431, and a body of more than `body` bytes,
    declared or chunked, with 413; reads the body.
    """

    def __init__(self, app: ASGIApp, head: int, body: int) -> None:
        self.app = app
        self.head = head
        self.limit = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _head_size(scope) > self.head:
            error = HeadTooLargeError(f"the request line and headers are longer than {self.head} bytes")
            await _refuse(error, scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if not length and "transfer-encoding" not in headers and not _may_have_body(scope):
            await self.app(scope, receive, send)
            return
        if length.isdigit() and int(length[:20]) > self.limit:
            await _refuse(self._too_large(), scope, receive, send)
            return
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.limit:
                await _refuse(self._too_large(), scope, receive, send)
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

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body is longer than {self.limit} bytes")


class Direct:
    """Calls endpoints that take the request and give a response: the router, its contexts and its
    parameters, of which they need nothing, would be a tenth of what a request costs.

    The router has them as well: it documents them and says what other methods get.

    Args:
        routes: with one method each.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self.app = app
        self.routes = {(method, route.path): route for route in routes for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route  # spans are named after it
        try:
            response: Response = await route.endpoint(Request(scope, receive, send))
        except (ApiError, InvalidRequestError) as error:
            response = error_response(error)
        await response(scope, receive, send)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
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


def _head_size(scope: Scope) -> int:
    # As sent: "name: value" and a line end each.
    headers = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return headers + len(scope.get("raw_path", b"")) + len(scope["query_string"])


def _may_have_body(scope: Scope) -> bool:
    return scope["method"] in ("POST", "PUT", "PATCH")


async def _discard(receive: Receive) -> None:
    size = 0
    while size <= _DISCARD_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
