"""A client of the server, in Python: `from server.client import Client, AsyncClient`.

    calls        what is asked, and how its answer is read
    attempts     when a call is made again, and when it is given up
    results      what comes back
    errors       what is raised
    blocking, asynchronous   the same calls over either kind of I/O: nothing else differs

It needs httpx2 and pydantic, which is all that the package without extras installs, and imports
nothing of the server but the models of the contract.
"""

from server.client.asynchronous import AsyncClient
from server.client.blocking import Client
from server.client.calls import GenerateOptions, StreamOptions
from server.client.errors import (
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
from server.client.results import Generation, Image, ImageEvent, Model, Plan
from server.schemas import Timings

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
