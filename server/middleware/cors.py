"""CORS: the pages of other origins that may ask, and the headers of a reply that they may read.

Keys travel in headers and never as cookies, so no credentials are allowed and `*` is safe.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.errors import BadRequestError, envelope, shortened

METHODS = ("GET", "POST")
_RESULTS = (
    *("id", "model", "plan", "steps", "requested-plan", "seed", "index", "receipt"),
    *("queue-ms", "compute-ms", "encode-ms", "total-ms"),
)
_OTHERS = ("x-request-id", "retry-after", "etag", "www-authenticate", "content-disposition")
REPLY_HEADERS = (*(f"x-dd-{name}" for name in _RESULTS), *_OTHERS)


class Cors(CORSMiddleware):
    """Starlette's middleware with our rules; a refusal has the envelope of every error."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),  # clients send their own, as OpenAI's does: none of them is a danger here
            expose_headers=REPLY_HEADERS,
            allow_private_network=True,  # a page that is listed may be public, and the server not
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        reply = super().preflight_response(request_headers)
        if reply.status_code < 400:
            return reply
        origin, method = request_headers["origin"], request_headers["access-control-request-method"]
        reasons = []
        if not self.is_allowed_origin(origin):
            reasons.append(f"the origin {shortened(origin)!r} is none of --cors-origins")
        if method not in METHODS:
            reasons.append(f"pages may send {' and '.join(METHODS)}, not {shortened(method)!r}")
        message = "; ".join(reasons)
        kept = {name: value for name, value in reply.headers.items() if not name.startswith("content-")}
        return envelope(400, BadRequestError.code, message, None, kept)
