"""uvicorn's HTTP/1.1 protocol with bounds on what a client can hold, and our envelope for its refusals.

The middleware sees a request when its head is there. Here is what goes wrong before that or between two
requests: what is not HTTP, a head without an end, a client that is silent, slow or does not read, a
connection too many. Here alone, too, it is noticed that a client has left.
docs/decisions/0005-the-connection-layer.md has the reasons.
"""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Any, Literal, cast

import httptools
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.errors import ApiError, CrowdedError, HeadTooLargeError, InvalidHTTPError, SlowClientError
from server.errors import error_response as response_to
from server.observability.metrics import Metrics
from server.observability.traffic import UNKNOWN
from server.settings import Settings

# What runs for these is cancelled when the client leaves: nobody else wants it.
_GENERATING = ("/generate", "/v1/images/", "/images/")
# What a client still sends after its last reply is dropped for this long, and so many bytes of it.
_LINGER_SECONDS = 10.0
_LINGER_BYTES = 256 * 2**20
# Requests of one connection that may wait behind the one that runs: one read could bring ten thousand.
_MOST_WAITING = 1000


def protocol(settings: Settings, metrics: Metrics) -> type[HttpToolsProtocol]:
    """The protocol for `uvicorn.Config(http=…)`; what it refuses is counted in `metrics`."""
    return type("Protocol", (BoundedProtocol,), {"settings": settings, "metrics": metrics})


class BoundedProtocol(HttpToolsProtocol):
    """A connection."""

    settings: Settings
    metrics: Metrics
    _running: RequestResponseCycle | None = None  # `cycle` is the newest, which may wait in `pipeline`
    _part: Literal["", "head", "body"] = ""  # of a request, to which the next byte belongs
    _head: int | None = None  # bytes of a head that has not ended; None where it began in this read
    _beside = 0  # bytes since the last of a body: trailers, which the parser keeps, and what chunks say
    _fed = False  # this read had some of a body
    _task: asyncio.Task[Any] | None = None  # of the request that runs
    _abandoned = False  # it has been cancelled, because nobody will read its reply
    _begun = False  # its reply has been
    _held = b""  # the head of a reply, until its body's first piece or the end of the loop's turn
    _dropped: int | None = None  # bytes after the last reply; None where there is another to come
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.is_closing = self.transport.is_closing  # for replies
        self.transport.set_write_buffer_limits(high=0)  # what is left, be it a byte, waits for its reader
        self._late = self.loop.call_later(self.settings.receive_timeout, self._give_up)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(CrowdedError("the server has too many connections", retry_after=1))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._held = b""
        self.resume_writing()
        if self._running is not None:  # uvicorn tells the newest alone
            self._abandon(self._running)
        super().connection_lost(exc)
        self.cycle = self._running = None  # type: ignore[assignment]  # they refer to this

    def data_received(self, data: bytes) -> None:
        if self._dropped is not None:
            self._dropped += len(data)
            if self._dropped > _LINGER_BYTES:
                self.transport.close()
            return
        self._unset_keepalive_if_required()
        self._fed, before = False, self.cycle if self._part == "body" else None
        try:
            self._parse(data)
            if self._part == "head":
                self._head = self._head_size() if self._head is None else self._head + len(data)
                self._check_head(self._head)
            elif self._part == "body" and self.cycle is before:
                self._beside = 0 if self._fed else self._beside + len(data)
                self._check_head(self._beside)
        except (httptools.HttpParserError, ApiError) as error:
            cause = error.__context__ or error  # what a callback raised
            if not isinstance(cause, ApiError):
                self.logger.warning("Invalid HTTP request received.")
                cause = InvalidHTTPError(f"this is not HTTP/1.1: {cause}")
            self._refuse(cause)
        self._set_timers()

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                # The parser stops behind a head that offers another protocol, as the first one of Java's
                # client does, and leaves its body to that protocol: another reads the head without the offer.
                method, version = self.parser.get_method(), self.parser.get_http_version().encode()
                kept = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
                start = b"%b %b HTTP/%b" % (method, self.url, version)
                data = b"\r\n".join([start, *kept, b"", data[offer.args[0] :]])
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part, self._head = "head", None

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._part == "head":  # what comes behind a chunked body is not of the head
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        hosts, version = [name for name, _ in self.headers].count(b"host"), self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise InvalidHTTPError("this is not HTTP/1.1: the version is neither 1.0 nor 1.1")
        if hosts > 1 or (not hosts and version != "1.0"):
            raise InvalidHTTPError("this is not HTTP/1.1: there must be one Host")
        if len(self.pipeline) >= _MOST_WAITING:
            raise InvalidHTTPError("too many requests of one connection wait for their replies")
        self._check_head(self._head_size())
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.cycle.transport = cast(asyncio.Transport, self)
            self._part, self._beside = "body", 0
        elif self.parser.get_method() == b"CONNECT":
            raise InvalidHTTPError("this is not a proxy")

    def on_body(self, body: bytes) -> None:
        self._fed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._part = ""

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _check_head(self, size: int) -> None:
        most = self.settings.max_header_bytes
        if size > most:
            what = "what follows the body is" if self._part == "body" else "the request line and headers are"
            raise HeadTooLargeError(f"{what} longer than {most} bytes")

    def write(self, data: bytes) -> None:
        """Write of a reply, which takes the protocol for its transport; a head leaves in one piece with what
        follows it in the same turn of the loop.

        A process that is killed between the two would lose the request: a proxy that has the head of a reply
        can no longer send the request to another replica.
        """
        cycle = cast(RequestResponseCycle, self._running)
        begins = cycle.response_started and not self._begun  # before, there is 100 Continue
        self._begun = cycle.response_started
        if begins and cycle.scope["method"] != "HEAD":
            self._held = data
            self.loop.call_soon(self._release)
        else:
            held, self._held = self._held, b""
            self.transport.write(held + data)

    def _release(self) -> None:
        if self._held:
            self.write(b"")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running, self._task, self._begun = cycle, None, False
        super()._start_asgi_task(cycle, partial(self._serve, cycle, app))

    def _abandon(self, cycle: RequestResponseCycle) -> None:
        """End a request whose reply nobody will read."""
        cycle.disconnected = True
        cycle.message_event.set()
        wanted = not (cycle.more_body or cycle.scope["path"].startswith(_GENERATING))
        if self._task is not None and not (cycle.response_complete or wanted):
            self._abandoned = True
            self._task.cancel()

    async def _serve(
        self, cycle: RequestResponseCycle, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run the application for a request until it has replied, or is abandoned: the one place that
        notices that a client has left.
        """
        if cycle.disconnected:
            return
        self._task = task = cast("asyncio.Task[Any]", asyncio.current_task())
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._abandoned or task.uncancel():  # the server's end cancels as well
                raise

    def close(self) -> None:
        """End the connection behind a reply."""
        self._release()
        if self._part:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Drop what is still sent: closing at once would reset the connection, and lose the reply."""
        self._dropped = 0
        self._stop_waiting()
        self._late = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        self.pipeline.clear()
        self.flow.resume_reading()
        self.transport.write_eof()

    def _reply_is_due(self) -> bool:
        """True where a request that is there waits for its reply."""
        running = self._running
        return running is not None and not (running.more_body or running.response_complete)

    def _refuse(self, error: ApiError) -> None:
        """End the connection with a reply to what still comes, or with the replies that are due before it."""
        if self._reply_is_due():
            self._dropped = 0
            if self._part == "body":
                self.pipeline.popleft()
            last = self.pipeline[0][0] if self.pipeline else self._running
            cast(RequestResponseCycle, last).keep_alive = False
            return
        if self._part == "body":
            if self.cycle.response_started:
                self.transport.close()
                return
            self._abandon(self.cycle)  # the application need not reply
        self._count(error)
        reply = response_to(error)
        reply.headers["connection"] = "close"
        head = b"".join(b"%b: %b\r\n" % header for header in reply.raw_headers)
        self.transport.write(STATUS_LINE[reply.status_code] + head + b"\r\n" + bytes(reply.body))
        self._linger()

    def _count(self, error: ApiError) -> None:
        path = method = UNKNOWN
        if self._part == "body":
            scope = self.cycle.scope
            path, method = scope["path"], scope["method"]
            scope["state"]["refused"] = error.status  # the application must not count it as one that left
        self.metrics.traffic.count(method, path, error.status)
        self.metrics.rejected(error)

    def _set_timers(self) -> None:
        """Start the time in which the rest of a request has to come, or stop it."""
        if self._dropped is not None:
            return
        if self._part:
            self._late = self._late or self.loop.call_later(self.settings.receive_timeout, self._give_up)
            return
        self._stop_waiting()
        if not self._reply_is_due():  # an empty line, or the end of a body that its reply did not wait for
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self._reply_is_due():
            self._set_timers()  # the client waits itself
        elif self._part:
            seconds = self.settings.receive_timeout
            self._refuse(SlowClientError(f"the request was not there after {seconds:g} s"))
        else:
            self.transport.close()

    def timeout_keep_alive_handler(self) -> None:
        if not self._part and self._dropped is None:  # else the client still sends, and `_late` is set
            super().timeout_keep_alive_handler()

    def end_unfinished(self, error: ApiError) -> None:
        """Refuse a request that has not come whole, at the end of a drain."""
        if self._part and self._dropped is None:
            self._refuse(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _expect_reader(self, before: float = math.inf) -> None:
        """Give up a client that has read nothing for the time; one that reads slowly may go on."""
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(self.settings.receive_timeout, self._expect_reader, left)
