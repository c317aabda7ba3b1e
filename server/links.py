"""Addresses that the server gives out: links to images, redirects, and its own in `/openapi.json`.

They begin with `--public-url`; without it, with what the request was sent to, as a trusted proxy told it
(`server.middleware.proxies`): scheme and Host are in the request's scope then, the prefix in its state.
"""

from __future__ import annotations

from starlette.datastructures import URL
from starlette.requests import Request
from starlette.types import Scope


def set_base(scope: Scope, public_url: str, prefix: str) -> None:
    """Note what the links of a request begin with.

    Args:
        public_url: scheme, host and path; empty = those of the request.
        prefix: path under which a proxy serves the server; not part of the request's own path.
    """
    scope.setdefault("state", {}).update(public_url=public_url, prefix=prefix)


def moved(scope: Scope) -> bool:
    """True where a link is more than the request's own address with another path."""
    return bool(scope["state"]["public_url"] or scope["state"]["prefix"])


def base_url(scope: Scope) -> str:
    """Return the address of the server as its clients know it, without a slash at the end."""
    state = scope["state"]
    if state["public_url"]:
        return str(state["public_url"])
    origin = str(URL(scope={**scope, "path": "/", "query_string": b""}))
    return origin.removesuffix("/") + str(state["prefix"])


def link(request: Request, name: str, /, **params: str) -> URL:
    """Return the address of the route called `name`."""
    return URL(base_url(request.scope) + str(request.app.url_path_for(name, **params)))
