"""Python client of the server, blocking and for asyncio, and the wire contract of both sides.

    contract      requests, replies and events of the HTTP interface
    calls         the request of each call, and the reader of its reply
    client, aio   the same calls over blocking I/O and over asyncio
    retries       retries and their limits
    results       types of the results
    errors        types of the errors

It needs httpx2 and pydantic only: what the distribution installs without extras.
"""

from distilled_decoding.aio import AsyncClient
from distilled_decoding.client import Client
from distilled_decoding.contract import GenerateOptions, StreamOptions, Timings
from distilled_decoding.errors import (
    BadRequestError,
    ConflictError,
    ConnectionFailedError,
    DDClientError,
    DeadlineExceededError,
    InvalidReplyError,
    InvalidURLError,
    NotFoundError,
    OverloadedError,
    ServerError,
    TimedOutError,
    UnauthorizedError,
)
from distilled_decoding.results import Generation, Image, ImageEvent, Model, Plan

__all__ = [
    "AsyncClient",
    "BadRequestError",
    "Client",
    "ConflictError",
    "ConnectionFailedError",
    "DDClientError",
    "DeadlineExceededError",
    "GenerateOptions",
    "Generation",
    "Image",
    "ImageEvent",
    "InvalidReplyError",
    "InvalidURLError",
    "Model",
    "NotFoundError",
    "OverloadedError",
    "Plan",
    "ServerError",
    "StreamOptions",
    "TimedOutError",
    "Timings",
    "UnauthorizedError",
]
