"""A client of the server, in Python: `from distilled_decoding import Client, AsyncClient`.

    calls        what is asked, and how its answer is read
    attempts     when a call is made again, and when it is given up
    results      what comes back
    errors       what is raised
    blocking, asynchronous   the same calls over either kind of I/O: nothing else differs

It needs httpx2 and pydantic, which is all that the package without extras installs, and imports
nothing of the server but the models of the contract.
"""

from distilled_decoding.aio import AsyncClient
from distilled_decoding.calls import GenerateOptions, StreamOptions
from distilled_decoding.client import Client
from distilled_decoding.contract import Timings
from distilled_decoding.errors import (
    BadRequestError,
    ConflictError,
    ConnectionFailedError,
    DDClientError,
    DeadlineExceededError,
    InvalidReplyError,
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
