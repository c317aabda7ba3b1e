"""The open loop's sender: a process of its own that keeps to its schedule whatever the server does.

    order (JSON on standard input) → each request at its time → what became of it (JSON on standard output)

Nothing here waits for a reply: a request takes a connection that is free, or opens one. No request
has a task or a timer of its own, so that thousands a second cost little of the machine that the
server shares. Times are seconds since the schedule's zero.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.client import Call, parse_head, request_bytes

_END = b"\r\n\r\n"
_PAUSE = 0.1  # seconds before a closed loop tries again after anything but a 200
_LOST = "connection lost"


def _nothing(_: Exchange) -> None:
    return


@dataclass(eq=False)
class Exchange:
    """One request and what became of it.

    Args:
        kind: index of its class.
        at: when it was scheduled.
        request: head and body.
        starts_with: what the body of a good reply begins with.
        after: called when it has ended.
        sent: when it was handed to the system.
        done: when the last byte of the reply was there; None without one.
        status: of the reply; 0 without one.
        failure: what was wrong other than the status.
        retried: it has met a connection that was being closed.
    """

    kind: int
    at: float
    request: bytes
    starts_with: bytes
    after: Callable[[Exchange], None] = _nothing
    sent: float | None = None
    done: float | None = None
    status: int = 0
    failure: str | None = None
    retried: bool = False

    def row(self) -> list[Any]:
        """As it is printed."""
        return [self.kind, self.at, self.sent, self.done, self.status, self.failure]


class _Connection(asyncio.Protocol):
    """One exchange at a time; of a reply it counts the bytes and keeps the first few."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._used = False
        self._begin(None)

    def _begin(self, exchange: Exchange | None) -> None:
        self._exchange = exchange
        self._head = b""
        self._missing: int | None = None  # bytes of the body; None before the head is complete
        self._body = b""
        self._keep = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, exchange: Exchange) -> None:
        """Start an exchange; the sender hears of its end."""
        self._begin(exchange)
        exchange.sent = self._sender.now()
        self._transport.write(exchange.request)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self._transport.abort()  # bytes that nobody asked for
            return
        if self._missing is None:
            head, end, data = (self._head + data).partition(_END)
            if not end:
                self._head = head
                return
            try:
                self._exchange.status, headers = parse_head(head)
                self._missing = int(headers["content-length"])
            except ValueError:
                self._finish("no HTTP/1.1 reply with a length")
                return
            self._keep = headers.get("connection", "").lower() != "close"
        self._missing -= len(data)
        wanted = self._exchange.starts_with
        if len(self._body) < len(wanted):
            self._body += data[: len(wanted)]
        if self._missing <= 0:
            good = self._exchange.status != 200 or self._body.startswith(wanted)
            self._finish(None if good else "unexpected body")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._sender.forget(self)
        exchange = self._exchange
        if exchange is None:
            return
        # A server may close an idle connection just when it is taken. That is no answer: ask again.
        if self._used and self._missing is None and not self._head and not exchange.retried:
            exchange.retried = True
            self._exchange = None
            self._sender.submit(exchange)
        else:
            self._finish(_LOST)

    def _finish(self, failure: str | None) -> None:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        exchange.failure = failure
        if failure != _LOST:
            exchange.done = self._sender.now()
        self._used = True
        if failure is None and self._keep and self._missing == 0:
            self._sender.free(self)
        else:
            self._transport.close()
        exchange.after(exchange)

    def close(self) -> None:
        """At once; what is under way stays without a reply."""
        self._exchange = None
        self._transport.abort()


class Sender:
    """The connections to one server.

    Args:
        zero: the schedule's zero on the event loop's clock.
    """

    def __init__(self, host: str, port: int, zero: float) -> None:
        self._address = (host, port)
        self._loop = asyncio.get_running_loop()
        self._zero = zero
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self.opened = 0

    def now(self) -> float:
        """Seconds since the schedule's zero."""
        return self._loop.time() - self._zero

    def submit(self, exchange: Exchange) -> None:
        """Send at once, on a connection that is free or on a new one."""
        if self._idle:
            self._idle.pop().send(exchange)
            return
        task = self._loop.create_task(self._open(exchange))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, exchange: Exchange) -> None:
        try:
            _, connection = await self._loop.create_connection(lambda: _Connection(self), *self._address)
        except OSError as error:
            exchange.failure = type(error).__name__
            exchange.after(exchange)
            return
        self.opened += 1
        self._all.add(connection)
        connection.send(exchange)

    def free(self, connection: _Connection) -> None:
        """It may serve another."""
        self._idle.append(connection)

    def forget(self, connection: _Connection) -> None:
        """It is closed."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Leave, whatever is under way."""
        for task in self._opening:
            task.cancel()
        for connection in list(self._all):
            connection.close()


class _Background:
    """Closed-loop clients that keep a server busy until they are stopped."""

    def __init__(self, sender: Sender, clients: int, patterns: list[Exchange]) -> None:
        self._sender = sender
        self._patterns = itertools.cycle(patterns)
        self._stopped = False
        self.ended: list[Exchange] = []
        for _ in range(clients):
            self._next()

    def _next(self) -> None:
        if not self._stopped:
            like = next(self._patterns)
            now = self._sender.now()
            self._sender.submit(Exchange(like.kind, now, like.request, like.starts_with, self._again))

    def _again(self, exchange: Exchange) -> None:
        self.ended.append(exchange)
        good = exchange.status == 200 and exchange.failure is None
        asyncio.get_running_loop().call_later(0 if good else _PAUSE, self._next)

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True


async def _send_all(sender: Sender, exchanges: list[Exchange], patience: float) -> None:
    """Each at its time; returns when all have ended, or `patience` seconds after the last."""
    loop = asyncio.get_running_loop()
    waiting, position = len(exchanges), 0
    ended = asyncio.Event()

    def count(_: Exchange) -> None:
        nonlocal waiting
        waiting -= 1
        if not waiting:
            ended.set()

    def send_what_is_due() -> None:
        nonlocal position
        while position < len(exchanges) and exchanges[position].at <= sender.now():
            exchanges[position].after = count
            sender.submit(exchanges[position])
            position += 1
        if position < len(exchanges):
            loop.call_later(exchanges[position].at - sender.now(), send_what_is_due)

    send_what_is_due()
    if exchanges:
        try:
            await asyncio.wait_for(ended.wait(), exchanges[-1].at - sender.now() + patience)
        except TimeoutError:
            return  # what has no reply by now is told as it is


def _exchanges(order: dict[str, Any], arrivals: list[list[Any]]) -> list[Exchange]:
    """`[time, class, body]` → requests that only have to be sent."""
    made = []
    for at, kind, body in arrivals:
        about = order["classes"][kind]
        call = Call("POST", "/generate", body.encode(), about["accept"])
        request = request_bytes(call, order["host"], order["port"])
        made.append(Exchange(kind, at, request, about["starts_with"].encode("latin-1")))
    return made


async def _obey(order: dict[str, Any]) -> dict[str, Any]:
    exchanges = _exchanges(order, order["arrivals"])
    patterns = _exchanges(order, order["background"])
    zero = asyncio.get_running_loop().time() + order["lead"]
    sender = Sender(order["host"], order["port"], zero)
    background = _Background(sender, order["background_clients"], patterns)
    await asyncio.sleep(-sender.now())
    cpu = time.process_time()
    await _send_all(sender, exchanges, order["patience"])
    cpu = time.process_time() - cpu
    seconds = sender.now()
    background.stop()
    sender.close()
    return {
        "records": [exchange.row() for exchange in exchanges],
        "background": [exchange.row() for exchange in background.ended],
        "connections": sender.opened,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def main() -> int:
    """Obeys one order."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # in an overload every request that waits has a connection
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    order = json.load(sys.stdin)
    print(json.dumps(asyncio.run(_obey(order))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
