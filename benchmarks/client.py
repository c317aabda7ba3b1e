"""Closed-loop clients: each has one connection and sends its next request when it has its answer.

Two implementations of one exchange: `lean` reads HTTP/1.1 from an asyncio stream and does nothing
else; `httpx` is the usual library. A client shares the machine with the server that it loads, so
what it costs itself is measured with every load (`cpu_seconds`) and filed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import httpx

HOST = "127.0.0.1"
NO_REPLY = "no reply"
_BEGINNINGS = {
    "image/png": b"\x89PNG\r\n\x1a\n",
    "image/jpeg": b"\xff\xd8",
    "application/json": b"{",
}  # of a good body
_PATIENCE = 120.0  # seconds that one request may take


class IdleClosedError(ConnectionError):
    """The server closed an idle connection just when it was taken: no answer to the request."""


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

    @classmethod
    def generate(cls, body: str, accept: str = "image/png", group: str = "") -> Self:
        """`POST /generate` of a JSON body."""
        starts_with = _BEGINNINGS.get(accept, b"")
        return cls("POST", "/generate", body.encode(), accept, group, starts_with)


class Reply(NamedTuple):
    """Status, body and the server's name of the plan (empty where there is none)."""

    status: int
    content: bytes
    plan: str


@dataclass(frozen=True)
class Outcome:
    """A call that has ended; `failure` is None for a good answer, else says why in a few words."""

    group: str
    plan: str
    seconds: float
    failure: str | None


@dataclass
class Record:
    """One request of an open loop and what became of it; times in seconds after the schedule's zero.

    Args:
        kind: index of its class.
        at: when it was scheduled.
        sent: when it was handed to the system.
        done: when the last byte of the reply was there; None without one.
        status: of the reply; 0 without one.
        failure: what was wrong other than the status.
    """

    kind: int
    at: float
    sent: float | None = None
    done: float | None = None
    status: int = 0
    failure: str | None = None

    @property
    def seconds(self) -> float:
        """From the scheduled arrival to the last byte of the reply; infinite without one."""
        return math.inf if self.done is None else self.done - self.at

    @property
    def good(self) -> bool:
        return self.status == 200 and self.failure is None and self.done is not None

    @property
    def outcome(self) -> str:
        """The status, or why there is none."""
        return self.failure or (NO_REPLY if self.done is None else str(self.status))


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


class LeanConnection:
    """HTTP/1.1 with keep-alive and `content-length`, no more; it opens with its first exchange."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.sent: float | None = None  # time on the event loop's clock of the last request

    async def exchange(self, call: Call) -> Reply:
        """Send and wait for the whole reply.

        Raises:
            OSError, EOFError: the connection broke; IdleClosedError if it was used before.
            ValueError: the reply is not HTTP/1.1 with a length.
        """
        used = self._streams is not None
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        self.sent = asyncio.get_running_loop().time()
        writer.write(self._request(call))
        try:
            status, headers = _parse_head(await reader.readuntil(b"\r\n\r\n"))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if used and not getattr(error, "partial", b""):
                raise IdleClosedError from error
            raise
        content = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection", "").lower() == "close":
            await self.aclose()
        return Reply(status, content, headers.get("x-dd-plan", ""))

    def _request(self, call: Call) -> bytes:
        head = (
            f"{call.method} {call.path} HTTP/1.1\r\nhost: {self._address[0]}:{self._address[1]}\r\n"
            f"accept: {call.accept}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(call.body)}\r\n\r\n"
        )
        return head.encode("ascii") + call.body

    @property
    def open(self) -> bool:
        """Another exchange finds it open, as far as this side knows."""
        return self._streams is not None and not self._streams[0].at_eof()

    async def aclose(self) -> None:
        """Close the connection; the next exchange opens another."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            try:
                await writer.wait_closed()
            except OSError:
                return  # the other side was first


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if not status.startswith("HTTP/1.1 ") or "content-length" not in headers:
        raise ValueError(f"no HTTP/1.1 reply with a content-length: {status[:60]}")
    return int(status.split(" ", 2)[1]), headers


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


Connection = LeanConnection | HttpxConnection
KINDS: dict[str, type[Connection]] = {"lean": LeanConnection, "httpx": HttpxConnection}


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


async def _run(connections: Sequence[Connection], calls: Sequence[Call]) -> list[Outcome]:
    waiting, outcomes = iter(calls), list[Outcome]()

    async def client(connection: Connection) -> None:
        for call in waiting:  # an iterator that all clients share
            outcomes.append(await _one(connection, call))

    await asyncio.gather(*map(client, connections))
    return outcomes


async def _drive(connections: Sequence[Connection], calls: Sequence[Call], warm_up: Sequence[Call]) -> Load:
    try:
        await _run(connections, warm_up)
        cpu, started = time.process_time(), time.perf_counter()
        outcomes = await _run(connections, calls)
        return Load(outcomes, time.perf_counter() - started, time.process_time() - cpu)
    finally:
        for connection in connections:
            await connection.aclose()


def drive(
    port: int, clients: int, calls: Sequence[Call], warm_up: Sequence[Call] = (), kind: str = "lean"
) -> Load:
    """Send `calls` in order by `clients` clients; `warm_up` goes before and is not measured.

    It ends by itself: there are as many requests as calls, and each has a time limit.

    Args:
        kind: one of `KINDS`.
    """
    connections = [KINDS[kind](HOST, port) for _ in range(clients)]
    return asyncio.run(_drive(connections, calls, warm_up))
