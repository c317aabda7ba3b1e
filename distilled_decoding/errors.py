"""Every error that the client raises.

    DDClientError
    ├── InvalidURLError (ValueError)   `base_url` is not the address of an HTTP server
    ├── ConnectionFailedError          no reply, or one that broke off
    │   └── TimedOutError              the client's own `timeout` has passed
    ├── InvalidReplyError              a reply that does not follow the contract: most likely another server's
    ├── BadRequestError                400, 405, 406, 408, 413, 415, 431
    ├── UnauthorizedError              401, 403
    ├── NotFoundError                  404
    ├── ConflictError                  409: a receipt of weights that are not loaded
    ├── OverloadedError                429, 503: try again, after `retry_after` seconds where it is given
    ├── DeadlineExceededError          504 of this server: the request's `deadline_ms` has passed
    └── ServerError                    every other 5xx

`code`, `message` and `param` are those of the server's error envelope; `status` is None where no reply came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import httpx2
from pydantic import ValidationError

from distilled_decoding.contract import ErrorBody, ErrorReply

REQUEST_ID = "x-request-id"
_SHOWN = 200  # characters of a foreign reply that go into the message


class DDClientError(Exception):
    """Root of the client's errors.

    Args:
        message: the description of the error, for people.
        status: HTTP status of the reply; for an error within a stream, the status it has as a reply.
        code: stable identifier of the error, from the envelope.
        param: the offending field of the request, where there is one.
        request_id: identifies the request in the server's log.
        retry_after: seconds after which the server accepts another attempt.
    """

    code = "client_error"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code or self.code
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        if self.status is None:
            return self.message
        request = f", request {self.request_id}" if self.request_id else ""
        return f"{self.message} ({self.status} {self.code}{request})"


class InvalidURLError(DDClientError, ValueError):
    """`base_url` is not the address of an HTTP server."""

    code = "invalid_url"


class ConnectionFailedError(DDClientError):
    """No reply came, or it broke off."""

    code = "connection_failed"


class TimedOutError(ConnectionFailedError):
    """The client's `timeout` has passed."""

    code = "timed_out"


class InvalidReplyError(DDClientError):
    """The reply does not follow the contract."""

    code = "invalid_reply"


class BadRequestError(DDClientError):
    """The request is not valid; `param` names the field and `message` the values that it allows."""


class UnauthorizedError(DDClientError):
    """The server requires a valid key: `Client(api_key=…)`."""


class NotFoundError(DDClientError):
    """No model of that name is loaded, or the path does not exist."""


class ConflictError(DDClientError):
    """The receipt refers to weights, or to a plan, that are not loaded."""


class OverloadedError(DDClientError):
    """The server is full, not ready, or too busy for the request's deadline."""


class DeadlineExceededError(DDClientError):
    """`deadline_ms` passed before the images were made."""


class ServerError(DDClientError):
    """The server, or a proxy in front of it, failed."""


_KINDS: Mapping[int, type[DDClientError]] = {
    401: UnauthorizedError,
    403: UnauthorizedError,
    404: NotFoundError,
    409: ConflictError,
    429: OverloadedError,
    503: OverloadedError,
}
# An event carries no status, since the reply began with 200: these are the codes' statuses as replies.
_STATUSES = {
    "deadline_exceeded": 504,
    "deadline_unreachable": 503,
    "device_killed": 503,
    "draining": 503,
    "not_ready": 503,
    "queue_full": 429,
}


def error_of(response: httpx2.Response) -> DDClientError:
    """Build the error for an unsuccessful reply, whose body has been read."""
    try:
        body = ErrorReply.model_validate_json(response.content).error
    except ValidationError:
        body = _foreign(response)
    headers = response.headers
    return _error(response.status_code, body, headers.get(REQUEST_ID), _seconds(headers.get("retry-after")))


def error_in_stream(data: str, request_id: str | None) -> DDClientError:
    """Build the error for the `error` event of a stream.

    Raises:
        InvalidReplyError: the event does not follow the contract.
    """
    try:
        body = ErrorReply.model_validate_json(data).error
    except ValidationError as error:
        raise InvalidReplyError(
            f"an event does not follow the contract: {error}", request_id=request_id
        ) from None
    return _error(_STATUSES.get(body.code, 500), body, request_id)


@contextmanager
def translated() -> Iterator[None]:
    """Raise httpx2's errors within the block as the client's own."""
    try:
        yield
    except (httpx2.SSEError, httpx2.DecodingError) as error:
        raise InvalidReplyError(f"the reply cannot be read: {error}") from error
    except (httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.PoolTimeout) as error:
        raise TimedOutError("no reply within the client's timeout") from error
    except httpx2.RequestError as error:
        reason = str(error) or type(error).__name__
        where = error.request.url.netloc.decode("ascii")
        raise ConnectionFailedError(f"no reply from {where}: {reason}") from error


def _error(
    status: int, body: ErrorBody, request_id: str | None, retry_after: float | None = None
) -> DDClientError:
    if body.code == "deadline_exceeded":  # and not by 504, which a proxy sends for reasons of its own
        kind: type[DDClientError] = DeadlineExceededError
    elif status < 400:
        kind = InvalidReplyError
    else:
        kind = _KINDS.get(status, BadRequestError if status < 500 else ServerError)
    return kind(
        body.message,
        status=status,
        code=body.code,
        param=body.param,
        request_id=request_id,
        retry_after=retry_after,
    )


def _foreign(response: httpx2.Response) -> ErrorBody:
    """Describe the reply of a proxy, or of another server, as an error body."""
    status = response.status_code
    known = status in HTTPStatus._value2member_map_
    said = " ".join(response.text.split())[:_SHOWN] or (HTTPStatus(status).phrase if known else "")
    return ErrorBody(
        type="server_error" if status >= 500 else "invalid_request_error",
        code=f"http_{status}",
        message=f"not a reply of this server: {said}",
        param=None,
    )


def _seconds(retry_after: str | None) -> float | None:
    """Parse `Retry-After`, a number of seconds or a date; None where it is absent or malformed."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
