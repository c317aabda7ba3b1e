"""Messages to and from a process over a pipe, without ever waiting for the other end.

The other end is a `multiprocessing.Connection`, which may stop in the middle of a message, or stop reading.
Here what has come is put together until a message is whole, and what cannot be sent yet is kept.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

# As `multiprocessing.Connection` frames them: a length of four bytes, or −1 and a length of eight.
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")
_LONGEST_SHORT = 0x7FFFFFFF


@dataclass(eq=False)
class MessagePipe(asyncio.Protocol):
    """One end of a pipe, on the event loop."""

    on_message: Callable[[Any], None]  # called with every message, in order
    on_closed: Callable[[], None]  # called once when the other end is closed, not after `close`
    _socket: socket.socket

    def __post_init__(self) -> None:
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, connection: Connection, on_message: Callable[[Any], None], on_closed: Callable[[], None]
    ) -> MessagePipe:
        """Take over our end of a `multiprocessing.Pipe`."""
        ours = socket.socket(fileno=os.dup(connection.fileno()))
        connection.close()
        loop = asyncio.get_running_loop()
        _, pipe = await loop.create_connection(lambda: cls(on_message, on_closed, ours), sock=ours)
        return pipe

    def send(self, message: object) -> None:
        """Send a message, now or as soon as the other end reads."""
        if self._transport is not None:
            data = bytes(ForkingPickler.dumps(message))
            short = len(data) <= _LONGEST_SHORT
            head = _SHORT.pack(len(data)) if short else _SHORT.pack(-1) + _LONG.pack(len(data))
            self._transport.write(head + data)

    def close(self) -> None:
        """Close this end; nothing more is sent or received."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport; called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Hand on the messages that are whole; called by the event loop."""
        self._received += data
        while self._transport is not None and (message := self._next_message()) is not None:
            self.on_message(ForkingPickler.loads(message))

    def _next_message(self) -> bytes | None:
        head = _SHORT.size
        if len(self._received) < head:
            return None
        (length,) = _SHORT.unpack_from(self._received)
        if length == -1:
            head += _LONG.size
            if len(self._received) < head:
                return None
            (length,) = _LONG.unpack_from(self._received, _SHORT.size)
        if len(self._received) < head + length:
            return None
        message = bytes(self._received[head : head + length])
        del self._received[: head + length]
        return message

    def connection_lost(self, error: Exception | None) -> None:
        """Note that the other end is gone; called by the event loop."""
        if self._transport is not None and error is not None:
            # Sending found it out, perhaps before all that the other end had said was read.
            with suppress(OSError):
                while data := self._socket.recv(2**16):
                    self.data_received(data)
        if self._transport is not None:
            self._transport = None
            self.on_closed()
