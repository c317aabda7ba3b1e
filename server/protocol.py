"""uvicorn's HTTP/1.1 protocol with bounds on what a client can hold, and our form of its refusals.

The middleware sees a request when its head is there. What goes wrong before that, or between two
requests, is answered here: what is not HTTP, a head without an end, a client that sends nothing or
too slowly, a connection too many.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from contextlib import suppress
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

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

# A client that sends everything before it reads gets this long to see why it was refused.
_LINGER_SECONDS = 2.0
# And so many bytes: what is read in that time costs processor time.
_LINGER_BYTES = 8 * 2**20


def protocol(settings: Settings) -> type[H11Protocol]:
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


class _Bounded(H11Protocol):
    most_head: int
    most_connections: int
    seconds: float
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _refused = False
    _discarded = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not always an `asyncio.Transport`: uvicorn takes uvloop's where that is installed.
        transport = cast(asyncio.Transport, transport)
        super().connection_made(transport)
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
        super().data_received(data)
        if self._receiving():
            self._start_timer()
        else:
            self._stop_timer()

    def pause_writing(self) -> None:
        """The system holds no more of a reply: the client has to read."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where h11 has refused what came, while it handles h11's exception."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # nonsense while a reply is under way: there is nothing left to say
            return
        error: ApiError = InvalidHTTPError(f"this is not HTTP/1.1: {msg}")
        if getattr(sys.exception(), "error_status_hint", 400) == 431:
            error = HeadTooLargeError(f"the request line and headers are longer than {self.most_head} bytes")
        self._stop_timer()
        self._answer(error)
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _receiving(self) -> bool:
        """A request has begun and not ended."""
        state = self.conn.their_state
        return state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._receiving() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            log.info("gave up a request that was not there after %g s", self.seconds)
            self._answer(SlowClientError(f"the request was not there after {self.seconds:g} s"))
        self.transport.close()

    def _answer(self, error: ApiError) -> None:
        """Reply in place of the application, for which the client has left."""
        self._refused = True
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        reply = error_response(error)
        headers = [*reply.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=reply.status_code, headers=headers),
            h11.Data(data=bytes(reply.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
