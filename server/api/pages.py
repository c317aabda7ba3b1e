"""`/`: the playground. `/docs`: the interface, rendered from `/openapi.json`. `/models.html` and
`/metrics.html`: what `/models` and `/metrics` say, as pages.

No outside resources; links and requests are relative, for servers behind a prefix.
"""

from __future__ import annotations

from pathlib import Path

import orjson
from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.links import base_url, moved

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).resolve().parent.parent / "static"
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # the address of a picture holds its prompt
}


def whole(app: ASGIApp) -> ASGIApp:
    """`app` without requests for parts of its files, which are small: all errors have one shape, and those of
    ranges would have another.
    """

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await app({**scope, "headers": headers}, receive, send)

    return served


class _Page(FileResponse):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await whole(super().__call__)(scope, receive, send)


@router.get("/")
async def playground() -> Response:
    """The page."""
    return _Page(STATIC / "index.html", headers=_HEADERS)


@router.get("/docs")
async def docs() -> Response:
    """The interface's description."""
    return _Page(STATIC / "docs.html", headers=_HEADERS)


@router.get("/models.html")
async def models() -> Response:
    """The loaded models."""
    return _Page(STATIC / "models.html", headers=_HEADERS)


@router.get("/metrics.html")
async def metrics() -> Response:
    """The metrics, as tables."""
    return _Page(STATIC / "metrics.html", headers=_HEADERS)


@router.get("/openapi.json")
async def description(request: Request) -> Response:
    """The interface for machines; it says where the server is where it is not beside this document."""
    document = request.app.openapi()
    if moved(request.scope):
        document = {**document, "servers": [{"url": base_url(request.scope)}]}
    return Response(orjson.dumps(document), media_type="application/json")


@router.get("/favicon.ico")
async def favicon() -> Response:
    """The page's icon."""
    return _Page(STATIC / "icon.svg", media_type="image/svg+xml")
