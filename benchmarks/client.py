"""Closed-loop clients: each has one connection and sends its next request when it has its answer.

Two implementations of one exchange: `lean` reads HTTP/1.1 from an asyncio stream and does nothing
else; `httpx` is the usual library. A client shares the machine with the server that it loads, so
what it costs itself is measured with every load (`cpu_seconds`) and filed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import httpx

Kind = Literal["lean", "httpx"]
KINDS: tuple[Kind, ...] = ("lean", "httpx")
PNG = b"\x89PNG\r\n\x1a\n"
_PATIENCE = 120.0  # seconds that one request may take


@dataclass(frozen=True)
class Call:
    """One request.

    Args:
        group: what results are told apart by.
        starts_with: what a good body begins with.
    """

    method: str
    path: str
    body: bytes = b""
    accept: str = "application/json"
    group: str = ""
    starts_with: bytes = b""


@dataclass(frozen=True)
class Reply:
    """Status, body and the server's name of the plan (empty where there is none)."""

    status: int
    content: bytes
    plan: str


@dataclass(frozen=True)
class Outcome:
    """What became of a call; `failure` is None for a good answer, else says why in a few words."""

    group: str
    plan: str
    seconds: float
    failure: str | None


@dataclass(frozen=True)
class Load:
    """A closed loop that has ended.

    Args:
        outcomes: one a call.
        seconds: from the first request to the last reply.
        cpu_seconds: that this process spent meanwhile: the client's own cost.
    """

    outcomes: list[Outcome]
    seconds: float
    cpu_seconds: float


class Connection(Protocol):
    """One client's way to the server."""

    async def exchange(self, call: Call) -> Reply: ...

    async def aclose(self) -> None: ...


def request_bytes(call: Call, host: str, port: int) -> bytes:
    """A call as HTTP/1.1 with keep-alive."""
    head = (
        f"{call.method} {call.path} HTTP/1.1\r\nhost: {host}:{port}\r\n"
        f"accept: {call.accept}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(call.body)}\r\n\r\n"
    )
    return head.encode("ascii") + call.body


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers (names in lower case) of a reply, up to its empty line.

    Raises:
        ValueError: it is not HTTP/1.1 with a length.
    """
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if not status.startswith("HTTP/1.1 ") or "content-length" not in headers:
        raise ValueError(f"no HTTP/1.1 reply with a content-length: {status[:60]}")
    return int(status.split(" ", 2)[1]), headers


class LeanConnection:
    """HTTP/1.1 with keep-alive and `content-length`, and not a line more."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def exchange(self, call: Call) -> Reply:
        """Send and wait for the whole reply.

        Raises:
            OSError, EOFError: the connection broke.
            ValueError: the reply is not HTTP/1.1 with a length.
        """
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request_bytes(call, *self._address))
        status, headers = parse_head(await reader.readuntil(b"\r\n\r\n"))
        content = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection", "").lower() == "close":
            await self.aclose()
        return Reply(status, content, headers.get("x-dd-plan", ""))

    async def aclose(self) -> None:
        """Close the connection; the next exchange opens another."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            try:
                await writer.wait_closed()
            except OSError:
                return  # the other side was first


class HttpxConnection:
    """The same by httpx, without proxies."""

    def __init__(self, host: str, port: int) -> None:
        self._client = httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=_PATIENCE, trust_env=False)

    async def exchange(self, call: Call) -> Reply:
        """Send and wait for the whole reply.

        Raises:
            httpx.HTTPError: the exchange failed.
        """
        headers = {"accept": call.accept, "content-type": "application/json"}
        reply = await self._client.request(call.method, call.path, content=call.body, headers=headers)
        return Reply(reply.status_code, reply.content, reply.headers.get("x-dd-plan", ""))

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.aclose()


def connect(kind: Kind, host: str, port: int) -> Connection:
    """A connection that opens with its first exchange."""
    return LeanConnection(host, port) if kind == "lean" else HttpxConnection(host, port)


async def _one(connection: Connection, call: Call) -> Outcome:
    plan, failure = "", None
    started = time.perf_counter()
    try:
        async with asyncio.timeout(_PATIENCE):
            reply = await connection.exchange(call)
    except (OSError, EOFError, ValueError, TimeoutError, httpx.HTTPError) as error:
        failure = type(error).__name__
        await connection.aclose()
    else:
        plan = reply.plan
        if reply.status != 200:
            failure = f"status {reply.status}"
        elif not reply.content.startswith(call.starts_with):
            failure = "unexpected body"
    return Outcome(call.group, plan, time.perf_counter() - started, failure)


class _Loop:
    """The clients of one load, who take their calls from one list."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections

    @classmethod
    def open(cls, kind: Kind, host: str, port: int, clients: int) -> Self:
        return cls([connect(kind, host, port) for _ in range(clients)])

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        waiting, outcomes = iter(calls), list[Outcome]()
        await asyncio.gather(*(self._client(c, waiting, outcomes) for c in self._connections))
        return outcomes

    async def _client(self, connection: Connection, calls: Iterator[Call], outcomes: list[Outcome]) -> None:
        for call in calls:  # an iterator that all clients share
            outcome = await _one(connection, call)
            outcomes.append(outcome)

    async def aclose(self) -> None:
        for connection in self._connections:
            await connection.aclose()


async def _drive(
    kind: Kind, host: str, port: int, clients: int, calls: Sequence[Call], warm_up: Sequence[Call]
) -> Load:
    async with aclosing(_Loop.open(kind, host, port, clients)) as loop:
        await loop.run(warm_up)
        cpu, started = time.process_time(), time.perf_counter()
        outcomes = await loop.run(calls)
        return Load(outcomes, time.perf_counter() - started, time.process_time() - cpu)


def drive(
    kind: Kind, host: str, port: int, clients: int, calls: Sequence[Call], warm_up: Sequence[Call] = ()
) -> Load:
    """Sends `calls` in order by `clients` clients; `warm_up` goes before and is not measured.

    It ends by itself: there are as many requests as calls, and each has a time limit.
    """
    return asyncio.run(_drive(kind, host, port, clients, calls, warm_up))
