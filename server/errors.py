"""Every error that the HTTP interface answers with; each one owns its status.

    ApiError (dd_core.errors.DDError)
    ├── BadRequestError        400  invalid_request
    │   ├── InvalidJSONError   400  invalid_json
    │   └── InvalidHTTPError   400  invalid_http
    ├── UnauthorizedError      401  unauthorized   (WWW-Authenticate)
    ├── UnknownModelError      404  unknown_model
    ├── NotAcceptableError     406  not_acceptable
    ├── SlowClientError        408  request_timeout
    ├── ConflictError          409  conflict
    │   └── OtherWeightsError  409  other_weights
    ├── BodyTooLargeError      413  body_too_large
    ├── MediaTypeError         415  unsupported_media_type
    │   └── ContentEncodingError 415  unsupported_encoding  (Accept-Encoding)
    ├── HeadTooLargeError      431  headers_too_large
    ├── ComputeError           500  compute_failed
    │   └── OutOfMemoryError   500  out_of_memory
    ├── QueueFullError         429  queue_full            (Retry-After)
    ├── CrowdedError           503  too_many_connections  (Retry-After)
    ├── DeviceKilledError      503  device_killed         (Retry-After)
    ├── UnavailableError       503  not_ready             (Retry-After)
    │   └── DrainingError      503  draining              (Retry-After)
    ├── DeadlineUnreachableError 503  deadline_unreachable (Retry-After)
    ├── DeadlineError          504  deadline_exceeded
    └── LoadTimeoutError       504  load_timeout

`dd_core.errors.InvalidRequestError` is answered like `BadRequestError`. Anything else is a bug:
500, `internal_error`, with nothing of the exception in the reply. The one envelope is
`{"error": {"type", "code", "message", "param"}}`.
"""

from __future__ import annotations

import math
from typing import Any, Self

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.responses import Response

from dd_core.errors import DDError, InvalidRequestError


class ApiError(DDError):
    """An error with an HTTP status, a stable code and, where useful, reply headers."""

    status = 500
    code = "internal_error"

    def __init_subclass__(cls, status: int | None = None, code: str | None = None) -> None:
        cls.status, cls.code = status or cls.status, code or cls.code

    @property
    def headers(self) -> dict[str, str]:
        return {}


class BadRequestError(ApiError, InvalidRequestError, status=400, code="invalid_request"):
    """The request contradicts the contract; `param` names the field."""


class InvalidJSONError(BadRequestError, code="invalid_json"):
    """The body is not JSON."""


class InvalidHTTPError(BadRequestError, code="invalid_http"):
    """The request is not well-formed HTTP/1.1, or breaks a rule of it."""


class UnauthorizedError(ApiError, status=401, code="unauthorized"):
    """The path needs a key that the request did not bring."""

    @property
    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class UnknownModelError(ApiError, status=404, code="unknown_model"):
    """No model of that name is loaded."""


class NotAcceptableError(ApiError, status=406, code="not_acceptable"):
    """`Accept` admits nothing that this request could be answered with."""


class ConflictError(ApiError, status=409, code="conflict"):
    """A model of this name is here, or on its way, or it is an alias of another; or a load was cancelled."""


class OtherWeightsError(ConflictError, code="other_weights"):
    """A receipt of weights, or of a plan, that are not here: the image cannot be made again."""


class SlowClientError(ApiError, status=408, code="request_timeout"):
    """The client took too long to send its request."""


class BodyTooLargeError(ApiError, status=413, code="body_too_large"):
    """The body is longer than the server reads; the connection ends with the reply."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is longer than {limit} bytes")

    @property
    def headers(self) -> dict[str, str]:
        return {"connection": "close"}


class HeadTooLargeError(ApiError, status=431, code="headers_too_large"):
    """The request line and headers are longer than the server reads."""


class MediaTypeError(ApiError, status=415, code="unsupported_media_type"):
    """The body is declared to be something other than JSON, or in a charset that JSON does not come in."""


class ContentEncodingError(MediaTypeError, code="unsupported_encoding"):
    """The body is compressed in another way than by gzip."""

    @property
    def headers(self) -> dict[str, str]:
        return {"accept-encoding": "gzip"}


class ComputeError(ApiError, code="compute_failed"):
    """The device failed on this request; the log has the reason."""


class OutOfMemoryError(ComputeError, code="out_of_memory"):
    """The device has no room for this request, even alone."""


class DeadlineError(ApiError, status=504, code="deadline_exceeded"):
    """`deadline_ms` passed before the images were done; nothing more is computed for them."""


class LoadTimeoutError(ApiError, status=504, code="load_timeout"):
    """The model was not loaded within the server's `load_timeout`; nothing of it is left."""


class _RetryError(ApiError):
    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    @classmethod
    def after(cls, seconds: float, message: str) -> Self:
        """Make an error with `seconds`, rounded up to whole ones, as the time to come again."""
        wait = max(1, math.ceil(seconds))
        return cls(f"{message}; try again in {wait} s", retry_after=wait)

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after)}


class QueueFullError(_RetryError, status=429, code="queue_full"):
    """The queue has no room for the request's images."""


class DeadlineUnreachableError(_RetryError, status=503, code="deadline_unreachable"):
    """The queue is too long for the request's `deadline_ms`: refused before it costs anything."""


class CrowdedError(_RetryError, status=503, code="too_many_connections"):
    """As many connections are open as the server keeps."""


class DeviceKilledError(_RetryError, status=503, code="device_killed"):
    """The device process was killed from outside: while it loaded, or at the request and its retries."""

    @classmethod
    def of(cls, message: str) -> Self:
        """Make one that says to come again when another process should be up."""
        return cls.after(_AFTER_KILLS, message)


class UnavailableError(_RetryError, status=503, code="not_ready"):
    """The model is still being warmed up."""


class DrainingError(UnavailableError, code="draining"):
    """The server is shutting down and takes no new work."""


_AFTER_KILLS = 10.0  # seconds
_SHOWN = 64  # characters of what was sent that a refusal repeats
# What OpenAI's clients look for, where it is not invalid_request_error or server_error.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed"}


def shortened(text: str) -> str:
    """Return as much of a text that was sent as a refusal repeats."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    usual = "invalid_request_error" if status < 500 else "server_error"
    kind = _TYPES.get(status, usual)
    # A path or a name that is quoted may hold what is no UTF-8.
    message = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"type": kind, "code": code, "message": message, "param": param}}


def envelope(
    status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Return an error in the one shape that every error has."""
    body = orjson.dumps(_body(status, code, message, param))
    return Response(body, status, headers, media_type="application/json")


def _answer_to(error: Exception) -> ApiError:
    """Return the error that is answered; of a bug it says nothing of what went wrong inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return BadRequestError(error.message, param=error.param)
    return ApiError("the server failed on this request; its log says why, under x-request-id")


def error_body(error: Exception) -> dict[str, Any]:
    """Return the envelope of an error or a bug, as it stands in a stream."""
    answer = _answer_to(error)
    return _body(answer.status, answer.code, answer.message, answer.param)


def error_response(error: Exception) -> Response:
    """Return the reply to an error or a bug."""
    answer = _answer_to(error)
    return envelope(answer.status, answer.code, answer.message, answer.param, answer.headers)


def not_found(path: str) -> Response:
    """Return the reply to a path that does not exist."""
    return envelope(404, _CODES[404], f"there is nothing at {path}")


def http_error_response(request: Request, error: HTTPException) -> Response:
    """Return the reply to an error of Starlette's or FastAPI's own."""
    if error.status_code == 413:
        return error_response(BodyTooLargeError(request.scope[MAX_BODY_SIZE_SCOPE_KEY]))
    path, method = shortened(request.url.path), shortened(request.method)
    message = {404: f"there is nothing at {path}", 405: f"{method} is not allowed on {path}"}.get(
        error.status_code, str(error.detail)
    )
    headers = dict(error.headers or {})
    return envelope(error.status_code, _CODES.get(error.status_code, "http_error"), message, None, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Route every deliberate error through the envelope (bugs are the middleware's)."""

    @app.exception_handler(DDError)
    async def on_dd_error(_request: Request, error: DDError) -> Response:
        if not isinstance(error, (ApiError, InvalidRequestError)):
            raise error  # a bug: the middleware logs it and answers
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        return http_error_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return envelope(400, BadRequestError.code, f"{param}: {first['msg']}", param)
