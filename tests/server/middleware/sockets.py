"""Requests as bytes on a socket: what no HTTP library would send, or not in this way."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.server.helpers import OK, PATIENCE, Running

BODY = json.dumps(OK).encode()
CHUNKED = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


def post(body: bytes = BODY, headers: str = "connection: close\r\n", length: int | None = None) -> bytes:
    """A request for an image as it goes over the wire."""
    size = len(body) if length is None else length
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n"
    )
    return head.encode() + headers.encode() + b"\r\n" + body


REQUEST = post(headers="")
HEAD = REQUEST.removesuffix(BODY)


def in_chunks(body: bytes, trailers: bytes = b"") -> bytes:
    """A body as one chunk, and its end."""
    return b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


@contextmanager
def connected(live: Running, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection to a server."""
    host, port = live.url.removeprefix("http://").split(":")
    with connected_to((host, int(port)), receive_buffer) as raw:
        yield raw


@contextmanager
def connected_to(address: tuple[str, int], receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection to an address."""
    with socket.socket() as raw:
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(PATIENCE)
        raw.connect(address)
        yield raw


def vanish(raw: socket.socket) -> None:
    """Close with a reset, as a process that is killed or a cable that is cut."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def rest(raw: socket.socket) -> bytes:
    """Everything until the server closes; fails where it resets the connection."""
    received = bytearray()
    while data := raw.recv(65536):
        received += data
    return bytes(received)


def statuses(replies: bytes) -> list[int]:
    """The statuses of the replies in `replies`."""
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", replies)]


def refusal(reply: bytes) -> tuple[int, str]:
    """Status and code of one reply that is an error and ends the connection."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"application/json" in head
    assert head.lower().count(b"connection: close") == 1
    error = json.loads(body)["error"]
    assert set(error) == {"type", "code", "message", "param"}
    assert len(error["message"]) < 400
    return int(head.split()[1]), error["code"]


def say(live: Running, data: bytes) -> bytes:
    """Send all of `data`; what comes back until the server closes."""
    with connected(live) as raw:
        raw.sendall(data)
        return rest(raw)


def until_cut_off(raw: socket.socket, data: bytes) -> list[int]:
    """Send `data` again and again, and fail if the server takes 64 MiB of it; the statuses of its replies."""
    for _ in range(-(-(2**26) // len(data))):
        try:
            raw.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            break
    else:
        pytest.fail("the server never closed the connection")
    with suppress(ConnectionResetError):  # a reset may overtake the reply
        return statuses(rest(raw))
    return []
