"""Pure ASGI middleware.

From the outside in:

    ProxyHeaders        client and address as a trusted proxy tells them (`server.middleware.proxies`)
    (tracing)           a span (`server.observability.tracing`)
    RequestContext      an id for the request, its count and its log line (`server.observability`)
    Cors                preflights, and the headers that other pages may read (`server.middleware.cors`)
    LastResort          a bug becomes a clean 500
    RequireKey          401 (`server.middleware.auth`)
    BodyLimit           413 (`server.middleware.limits`)
    HeadAsGet           HEAD wherever there is GET
    Direct              the busiest endpoints, without the router
    the routes

`BaseHTTPMiddleware` (`@app.middleware`) costs as much as the rest of a request. A client that leaves is
noticed by the connection (`server.middleware.connection`), which cancels the task of its request.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dd_core.errors import InvalidRequestError
from server.errors import ApiError, error_response, http_error_response
from server.middleware.auth import RequireKey, read_keys
from server.middleware.cors import Cors
from server.middleware.limits import BodyLimit
from server.middleware.proxies import ProxyHeaders
from server.observability.logs import log_request, shown_path
from server.observability.tracing import add_tracing, make_provider
from server.observability.traffic import CLIENT_LEFT, Traffic
from server.settings import Settings

log = logging.getLogger("dd_server")

_CLIENT_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")


def install_middleware(
    app: FastAPI, settings: Settings, traffic: Traffic, direct: Sequence[Route] = ()
) -> None:
    """Put the middleware around `app`.

    Args:
        traffic: counts every reply.
        direct: see `Direct`.

    Raises:
        InvalidRequestError: a file of keys cannot be used, or tracing is not installed.
    """
    api_keys, admin_keys = read_keys(settings)
    # The last one added is the outermost.
    app.add_middleware(Direct, routes=direct)
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, max_body_size=settings.max_body_bytes)
    app.add_middleware(RequireKey, api_keys=api_keys, admin_keys=admin_keys)
    app.add_middleware(LastResort)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(RequestContext, access_log=settings.access_log, traffic=traffic)
    if settings.otel_endpoint:
        add_tracing(app, make_provider(settings.otel_endpoint))
    app.add_middleware(ProxyHeaders, trusted=settings.trusted_proxies, public_url=settings.public_url)


class RequestContext:
    """Give every request an id (`x-request-id`, the client's own if it is well formed), count it when it has
    ended and, with `access_log`, log a line.
    """

    def __init__(self, app: ASGIApp, access_log: bool, traffic: Traffic) -> None:
        self.app = app
        self.access_log = access_log
        self.traffic = traffic

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
            if "refused" in state:  # by the connection, which has counted it
                status = state["refused"]
            else:
                self.traffic.count(scope["method"], scope["path"], status)
            if self.access_log:
                log_request(scope, status, sent)


class LastResort:
    """Turn an unexpected exception into a clean 500 whose traceback is in the log only."""

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
        except Exception as error:
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
            await error_response(error)(scope, receive, send)


class HeadAsGet:
    """Answer HEAD with the status and the headers of GET. A route that would compute something for the body
    looks for `head` in the request's scope.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        await self.app({**scope, "method": "GET", "head": True}, receive, without_body)


class Direct:
    """Call endpoints that take the request and give a response: the router, its contexts and its
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
        request = Request(scope, receive, send)
        try:
            response: Response = await route.endpoint(request)
        except (ApiError, InvalidRequestError) as error:
            response = error_response(error)
        except HTTPException as error:  # Starlette's, of a body that is too large
            response = http_error_response(request, error)
        await response(scope, receive, send)
