"""What is HTTP and what is not, and several requests on one connection."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.middleware.connection import BoundedProtocol
from tests.server.helpers import OK, Gate, Running, busy, running
from tests.server.middleware.sockets import (
    BODY,
    CHUNKED,
    HEAD,
    REQUEST,
    connected,
    in_chunks,
    post,
    refusal,
    rest,
    say,
    statuses,
)

GET = "GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x00\xff" * 100 + b"\r\n\r\n", [400]),
        (bytes.fromhex("16030100f1010000ed0303") + b"\x00" * 200, [400]),  # TLS
        (b"GET /healthz\r\n\r\n", [400]),
        (b"GET  /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", [200]),  # a space too many
        (b"GET /healthz HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", [400]),
        (b"GET /healthz HTTP/1.1\r\n\r\n", [400]),  # no host
        (b"GET /healthz HTTP/1.0\r\n\r\n", [200]),
        (f"{GET}x : y\r\n\r\n".encode(), [400]),
        (f"{GET}x: \0\r\n\r\n".encode(), [400]),
        (f"{GET}bad header\r\n\r\n".encode(), [400]),
        (f"{GET}no colon\r\n\r\n".encode(), [400]),
        (f"{GET}upgrade: h2c\r\nconnection: upgrade\r\n\r\n".encode(), [200]),
        (f"{GET}upgrade: websocket\r\nconnection: upgrade\r\n\r\n".encode(), [200]),
        (f"{GET}expect: 200-maybe\r\n\r\n".encode(), [200]),
        (f"{GET}\r\n".encode().replace(b"\r", b""), [400]),
        (b"hello\r\n\r\n", [400]),
        (b"A" * 60_000 + b" /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", [400]),
        (CHUNKED + b"not-a-size\r\n", [400]),
        (CHUNKED + b"xyz\r\n", [400]),
        (CHUNKED + b"-1\r\n", [400]),
        (CHUNKED + b"5\r\nabcdefgh\r\n", [400]),
        (CHUNKED + b"f" * 64 + b"\r\n", [400]),
        (post(headers="content-length: 5\r\n"), [400]),
        (post(length=-5), [400]),
        (post().replace(b"content-length: ", b"content-length: +"), [400]),
        (post().replace(b"content-length: ", b"content-length: 0x"), [400]),
        (post(headers="connection: close\r\nexpect: 100-continue\r\n"), [100, 200]),
        (post(headers="transfer-encoding: gzip\r\n"), [400]),
        (b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", [404]),
        (b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", [400]),
        (b"TRACE /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", [405]),
        (b"generate /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", [400]),
    ],
)  # fmt: skip
def test_what_is_no_http(abused: Running, data: bytes, expected: list[int]) -> None:
    replies = say(abused, data)
    assert statuses(replies) == expected
    if expected == [400]:
        assert refusal(replies) == (400, "invalid_http")


@pytest.mark.parametrize("data", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\nhost: x\r\n\r\n"])
def test_another_http(abused: Running, data: bytes) -> None:
    """Parsers differ in what they make of another version; none of them must fail on it."""
    with connected(abused) as raw:
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        assert all(status < 500 for status in statuses(rest(raw)))


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/" + "a" * 10_000, 404),
        ("/static/" + "a" * 10_000, 404),
        ("/static/" + "a" * 60_000, 431),
        ("/%00%ff" * 100, 404),
        ("/static/%00", 404),
        ("/static/../../etc/passwd", 404),
    ],
    ids=["long", "long file", "too long", "bytes", "nul", "outside"],
)
def test_a_path_made_to_hurt_is_refused(abused: Running, target: str, status: int) -> None:
    reply = say(abused, f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert refusal(reply) == (status, {404: "not_found", 431: "headers_too_large"}[status])


def test_requests_that_offer_another_protocol_are_answered_all_the_same(abused: Running) -> None:
    """Java's client offers HTTP/2 with its first request; the body comes with the head or later."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n\r\n"
    head, last = HEAD.removesuffix(b"\r\n"), HEAD.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n"
    with connected(abused) as raw:
        raw.sendall((head + offer + BODY) * 3 + head + offer)
        time.sleep(0.2)
        raw.sendall(BODY + last + BODY)
        text = rest(raw)
    assert text.count(b"HTTP/1.1 200 ") == 5 == text.count(b"HTTP/1.1 ")


def test_a_length_and_chunks_at_once_is_one_request(abused: Running) -> None:
    """Two readings of one message are how requests are smuggled past a proxy."""
    hidden = b"GET /hidden HTTP/1.1\r\nhost: x\r\n\r\n"
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n"
    found = statuses(say(abused, head + b"connection: close\r\n\r\n" + in_chunks(BODY) + hidden))
    assert found in ([200], [400])


def test_what_comes_behind_a_chunked_body_is_no_header(abused: Running) -> None:
    """A proxy that forgets the trailers must not be overruled by them."""
    head = CHUNKED.replace(b"host: x", b"host: x\r\nconnection: close")
    text = say(abused, head + in_chunks(BODY, b"X-Request-Id: trailing\r\n"))
    assert statuses(text) == [200]
    assert b"trailing" not in text


# ---- replies


def test_a_reply_leaves_in_one_piece(abused: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is killed behind the head of a reply loses the request: its proxy can try no other."""
    pieces: list[bytes] = []

    def made(protocol: HttpToolsProtocol, transport: asyncio.Transport) -> None:
        original(protocol, transport)
        write = transport.write

        def spy(data: bytes) -> None:
            pieces.append(data)
            write(data)

        monkeypatch.setattr(transport, "write", spy)

    original = BoundedProtocol.connection_made
    monkeypatch.setattr(BoundedProtocol, "connection_made", made)
    reply = say(abused, REQUEST + post(b"{}"))
    assert [statuses(piece) for piece in pieces] == [[200], [400]]
    assert b"".join(pieces) == reply
    pieces.clear()
    reply = say(abused, post(headers="connection: close\r\nexpect: 100-continue\r\n"))
    assert [statuses(piece) for piece in pieces] == [[100], [200]]
    assert b"".join(pieces) == reply


def test_the_head_of_a_stream_does_not_wait_for_its_first_event(
    bundle_folder: Path, manager: SyncManager
) -> None:
    gate = Gate(calls=manager.list())
    with running(bundle_folder, gate, warmup=False) as live, ThreadPoolExecutor(1) as pool:
        first = busy(live, gate, pool)
        with connected(live) as raw:
            raw.sendall(post(headers="accept: text/event-stream\r\nconnection: close\r\n"))
            assert statuses(raw.recv(65536)) == [200]
            gate.open.set()
            assert rest(raw).count(b"event: ") > 0
        assert first.result().status_code == 200


# ---- several requests of one connection


def test_pipelined_requests_are_answered_in_order(abused: Running) -> None:
    """The dear one first: its answer still comes before the cheap ones'."""
    bodies = [{"label": 1, "seed": 0, "steps": 64}, {"label": 2, "seed": 0}, {"label": "nothing"}, OK]
    data = b""
    for number, body in enumerate(bodies):
        close = "connection: close\r\n" if number == len(bodies) - 1 else ""
        data += post(json.dumps(body).encode(), headers=f"x-request-id: r{number}\r\n{close}")
    replies = say(abused, data)
    assert statuses(replies) == [200, 200, 400, 200]
    assert re.findall(rb"x-request-id: (r\d)", replies) == [b"r0", b"r1", b"r2", b"r3"]


def test_heads_of_many_requests_do_not_add_up(abused: Running) -> None:
    """More than the longest head in one read, which ends in the middle of a request."""
    requests = (HEAD + BODY) * 300
    with connected(abused) as raw:
        raw.sendall(requests + post()[:20])
        time.sleep(0.2)
        raw.sendall(post()[20:])
        assert statuses(rest(raw)) == [200] * 301


def test_more_requests_at_once_than_a_connection_may_have(abused: Running) -> None:
    assert 1000 <= statuses(say(abused, b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 10_000)).count(200) < 10_000


@pytest.mark.parametrize("requests", [1, 3])
def test_nonsense_behind_requests_does_not_cost_them_their_replies(abused: Running, requests: int) -> None:
    assert statuses(say(abused, REQUEST * requests + b"nonsense\r\n\r\n")) == [200] * requests
    assert statuses(say(abused, REQUEST * requests + CHUNKED + b"no chunk\r\n")) == [200] * requests
