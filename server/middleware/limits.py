"""The longest body of a request. The longest head is `server.middleware.connection`'s, which reads it."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import Receive, Scope, Send

from server.errors import BodyTooLargeError, error_response


class BodyLimit(RequestBodyLimitMiddleware):
    """Refuse with 413 a body that is declared to be, or comes out, longer than `max_body_size` bytes.

    A body of a declared length ends there, whatever comes. Of others Starlette counts what comes, and raises
    an `HTTPException` where the application reads too much of it.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self.max_body_size:
            await error_response(BodyTooLargeError(self.max_body_size))(scope, receive, send)
        elif length.isdigit() and "transfer-encoding" not in headers:
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)
