"""uvicorn's HTTP/1.1 protocol with bounds on what a client can hold, and our form of its refusals.

The middleware sees a request when its head is there. What goes wrong before that, or between two
requests, is answered here: what is not HTTP, a head without an end, a client that sends nothing or
too slowly, a connection too many.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import resource
import sys
from collections import deque
from contextlib import suppress
from typing import cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.errors import (
    ApiError,
    CrowdedError,
    HeadTooLargeError,
    InvalidHTTPError,
    SlowClientError,
    error_response,
)
from server.settings import Settings

log = logging.getLogger("dd_server")

_VERSIONS = ("1.0", "1.1")
# A client that sends everything before it reads gets this long to see why it was refused.
_LINGER_SECONDS = 2.0
# And so many bytes: what is read in that time costs processor time.
_LINGER_BYTES = 8 * 2**20
# Requests of one connection that may wait for their replies: one read could bring ten thousand.
_MOST_UNANSWERED = 1000
# What offers another protocol, none of which is spoken here.
_OFFERS = {b"upgrade", b"http2-settings"}


def protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """The protocol for `uvicorn.Config(http=…)`."""

    class Bounded(_Bounded):
        most_head = settings.max_header_bytes
        most_connections = settings.max_connections
        seconds = settings.receive_timeout

    return Bounded


def raise_file_limit() -> None:
    """Lets this process have as many open files as it may ask for; the usual 1,024 are a default of old."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Part(enum.Enum):
    """What of a request the next byte belongs to."""

    NONE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class _Bounded(HttpToolsProtocol):
    most_head: int
    most_connections: int
    seconds: float
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _refused = False
    _discarded = 0
    _part = _Part.NONE
    _head = 0  # bytes of a head that has not ended
    _data = b""  # what the parser is at
    _again: bytes | None = None  # what it is to be at next
    _offers_upgrade = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not always an `asyncio.Transport`: uvicorn takes uvloop's where that is installed.
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        self._unanswered: deque[RequestResponseCycle] = deque()
        if len(self.connections) > self.most_connections:
            error = CrowdedError("the server has too many connections", retry_after=1)
            self._answer(error)
            transport.close()
            return
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._discarded += len(data)
            if self._discarded > _LINGER_BYTES:
                self.transport.close()
            return
        again: bytes | None = data
        while again is not None and not self._refused:
            self._data, self._again = again, None
            super().data_received(again)
            again = self._again
        self._data = b""
        if self._part is _Part.HEAD and not self._refused:
            self._head += len(data)
            if self._head > self.most_head:
                self._refuse(_too_long(self.most_head))
        if self._part is _Part.NONE:
            self._stop_timer()
        else:
            self._start_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._part, self._head = _Part.HEAD, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._part is _Part.HEAD:  # what comes behind a chunked body is not of the head
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_http_version() not in _VERSIONS:
            raise ValueError("the version is neither 1.0 nor 1.1")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() != "1.0"):
            raise ValueError("there must be one Host")
        if len(self._unanswered) >= _MOST_UNANSWERED:
            raise ValueError("too many requests of one connection wait for their replies")
        self._offers_upgrade = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._offers_upgrade:
            return
        super().on_headers_complete()
        self.cycle.transport = cast(asyncio.Transport, JoinedWrites(self.transport, self.loop))
        self._part = _Part.BODY
        self._unanswered.append(self.cycle)

    def on_message_complete(self) -> None:
        if not self._offers_upgrade:
            super().on_message_complete()
            self._part = _Part.NONE

    def on_response_complete(self) -> None:
        cast(JoinedWrites, self._unanswered.popleft().transport).flush()  # a reply to HEAD has no body
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The system holds no more of a reply: the client has to read."""
        super().pause_writing()
        self._watch_reader()

    def _watch_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self.seconds, self._check_reader, left)

    def _check_reader(self, before: int) -> None:
        """Give up a client that has read nothing since; one that reads slowly may go on."""
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._unread is not None:
            self._unread.cancel()
        for cycle in self._unanswered:  # uvicorn tells the newest alone, of several that came at once
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where the parser has refused what came, while it handles its exception."""
        found = sys.exception()
        reason = found.__context__ if isinstance(found, httptools.HttpParserCallbackError) else found
        self._refuse(InvalidHTTPError(f"this is not HTTP/1.1: {reason or msg}"))

    def _unsupported_upgrade_warning(self) -> None:
        """What uvicorn calls where the parser has stopped behind a head that offers another protocol, as
        Java's client does at every first request: it is read again without the offer.
        """
        found = sys.exception()
        assert isinstance(found, httptools.HttpParserUpgrade)
        rest, head = self._data[found.args[0] :], [self.parser.get_method(), b" ", self.url, b" HTTP/"]
        head += [self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                kept = [token for token in value.split(b",") if token.strip().lower() not in _OFFERS]
                head += [b"connection: ", b",".join(kept), b"\r\n"]
            elif name not in _OFFERS:
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._again = b"".join([*head, b"\r\n", rest])

    @property
    def _last_whole(self) -> RequestResponseCycle | None:
        """Of the requests that wait for their replies the last one that came whole."""
        newest = self._unanswered[-1] if self._unanswered else None
        if self._part is not _Part.BODY or newest is not self.cycle:
            return newest
        return self._unanswered[-2] if len(self._unanswered) > 1 else None

    @property
    def _answered(self) -> bool:
        """The reply to the request that still comes has begun."""
        return self._part is _Part.BODY and self.cycle.response_started

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._last_whole is not None:
            self._start_timer()
            return
        if self._part is not _Part.NONE and not self._answered:
            log.info("gave up a request that was not there after %g s", self.seconds)
            self._answer(SlowClientError(f"the request was not there after {self.seconds:g} s"))
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """End the connection with a reply, and let the client read it."""
        self._stop_timer()
        if self._answered:
            self.transport.close()  # there is nothing left to say
            return
        last = self._last_whole
        if last is not None:
            self._refused, last.keep_alive = True, False  # the connection ends with its reply
            if last is not self.cycle:
                self._unanswered.pop()
                self.pipeline.popleft()  # its task has not begun
            return
        self._answer(error)
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _answer(self, error: ApiError) -> None:
        """Reply in place of the application, for which the client has left."""
        self._refused = True
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is not None:
            cast(JoinedWrites, cycle.transport).flush()
        reply = error_response(error)
        headers = b"".join(b"%b: %b\r\n" % header for header in reply.raw_headers)
        head = STATUS_LINE[reply.status_code] + headers + b"connection: close\r\n\r\n"
        self.transport.write(head + bytes(reply.body))


class JoinedWrites:
    """What a reply writes to its transport: what comes in one round of the event loop, as a head and its body
    do, goes out together. Every segment wakes the client, which on a busy machine takes the core away.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""
        self._end_of_round: asyncio.Handle | None = None

    def write(self, data: bytes) -> None:
        """Send `data` with what is held; hold it where nothing is."""
        if self._held:
            self._held += data
            self.flush()
        elif data:
            self._held = data
            self._end_of_round = self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what is held."""
        if self._end_of_round is not None:
            self._end_of_round.cancel()
            self._end_of_round = None
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)

    def close(self) -> None:
        """Close the transport behind what is held."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the transport takes nothing more."""
        return self._transport.is_closing()


def _too_long(most: int) -> ApiError:
    return HeadTooLargeError(f"the request line and headers are longer than {most} bytes")
