"""The longest body of a request. The longest head is `server.middleware.connection`'s, which reads it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import Receive, Scope, Send

from server.errors import BodyTooLargeError, error_response


class BodyLimit(RequestBodyLimitMiddleware):
    """Refuse with 413 a body that is declared to be, or comes out, longer than `max_body_size` bytes.

    Starlette counts what comes, and raises an `HTTPException` where the application reads too much of it.
    A declared length is refused here: for a route that reads no body, Starlette's reply has no envelope.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length = Headers(scope=scope).get("content-length", "")
            if length.isdigit() and int(length[:20]) > self.max_body_size:
                await error_response(BodyTooLargeError(self.max_body_size))(scope, receive, send)
                return
        await super().__call__(scope, receive, send)
