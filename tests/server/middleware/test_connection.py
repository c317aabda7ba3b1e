"""Clients that send too much, too slowly, not HTTP, or come in crowds: each costs a bounded amount."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.server.helpers import PATIENCE, Gate, Running, busy, eventually, running
from tests.server.test_errors import OK

BODY = json.dumps(OK).encode()
HEAD = (
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY)
)


@contextmanager
def connected(live: Running) -> Iterator[socket.socket]:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as raw:
        yield raw


def read_all(raw: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    parts = []
    while part := raw.recv(65536):
        parts.append(part)
    return b"".join(parts)


def answer(raw: socket.socket) -> tuple[int, str]:
    """Status and error code of the reply, after which the server closes."""
    head, _, body = read_all(raw).partition(b"\r\n\r\n")
    assert b"application/json" in head
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"type", "code", "message", "param"}
    return int(head.split()[1]), error["code"]


@pytest.fixture(scope="module")
def impatient(bundle_folder: Path) -> Iterator[Running]:
    """A server that waits half a second for a request."""
    with running(bundle_folder, receive_timeout=0.5) as live:
        yield live


# ---- too much


@pytest.mark.parametrize("size", [20_000, 100_000, 5_000_000])
def test_a_head_bomb_is_refused(server: Running, size: int) -> None:
    """Small enough to come in one piece with its end, and large enough not to."""
    with connected(server) as raw:
        raw.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\nX-Bomb: " + b"x" * size + b"\r\n\r\n")
        assert answer(raw) == (431, "headers_too_large")
    assert server.client.get("/models").status_code == 200


def test_a_head_without_an_end_is_refused(server: Running) -> None:
    with connected(server) as raw:
        raw.sendall(b"GET /models HTTP/1.1\r\n" + b"X-More: and more\r\n" * 2000)
        assert answer(raw) == (431, "headers_too_large")


def test_a_long_path_counts_too(server: Running) -> None:
    with connected(server) as raw:
        raw.sendall(b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(raw) == (431, "headers_too_large")


def test_a_head_within_the_limit_is_read(bundle_folder: Path) -> None:
    with running(bundle_folder, max_header_bytes=65536) as live:
        assert live.client.get("/models", headers={"x-large": "x" * 40_000}).status_code == 200


# ---- not HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",  # a TLS client
        b"GET /models HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
        b"GET /models HTTP/1.1\r\n\r\n",  # without Host
        b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot-a-size\r\n",
    ],
    ids=["words", "tls", "header", "no-host", "chunk"],
)
def test_what_is_not_http_gets_the_envelope(
    server: Running, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(server) as raw:
        raw.sendall(sent)
        assert answer(raw) == (400, "invalid_http")
    assert server.post(OK).status_code == 200
    assert "Traceback" not in caplog.text


CHUNKED = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_nonsense_after_a_refusal_has_begun_ends_the_connection(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The body is refused as too long while it comes; what comes then is no chunk."""
    with connected(server) as raw:
        raw.sendall(CHUNKED + b"20000\r\n" + b"x" * 0x20000)
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")
        raw.sendall(b"\r\nnot-a-size\r\n")
        read_all(raw)
    assert server.post(OK).status_code == 200
    assert "Traceback" not in caplog.text


def test_nonsense_behind_a_head_that_is_refused_leaves_no_traceback(
    bundle_folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Both the protocol and the application have an answer, in the same moment: one of them is sent."""
    (tmp_path / "keys").write_text("a-key-0123456789", encoding="ascii")
    with running(bundle_folder, api_keys_file=tmp_path / "keys") as live:
        with connected(live) as raw:
            raw.sendall(CHUNKED + b"not-a-size\r\n")
            assert answer(raw) == (400, "invalid_http")
        assert live.client.get("/healthz").status_code == 200
    assert "Traceback" not in caplog.text


def test_nonsense_behind_a_request_does_not_cost_it_its_reply(server: Running) -> None:
    with connected(server) as raw:
        raw.sendall(HEAD + BODY + b"nonsense\r\n\r\n")
        text = read_all(raw)
    assert text.startswith(b"HTTP/1.1 200 ")
    assert text.count(b"HTTP/1.1 ") == 1


def test_what_comes_behind_a_chunked_body_is_no_header(server: Running) -> None:
    """A proxy that forgets the trailers must not be overruled by them."""
    chunked = b"%x\r\n%b\r\n0\r\nX-Request-Id: trailing\r\n\r\n" % (len(BODY), BODY)
    with connected(server) as raw:
        raw.sendall(CHUNKED.replace(b"Host: x", b"Host: x\r\nConnection: close") + chunked)
        text = read_all(raw)
    assert text.startswith(b"HTTP/1.1 200 ")
    assert b"trailing" not in text


def test_trailers_without_end_are_given_up(impatient: Running) -> None:
    with connected(impatient) as raw:
        raw.sendall(CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY))
        began = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - began < PATIENCE:
                raw.sendall(b"X-More: and more\r\n" * 100)
        assert time.monotonic() - began < PATIENCE


def test_requests_that_offer_another_protocol_are_answered_all_the_same(server: Running) -> None:
    """Java's client offers HTTP/2 with its first request; the body comes with the head or later."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n\r\n"
    head, last = HEAD.removesuffix(b"\r\n"), HEAD.removesuffix(b"\r\n") + b"Connection: close\r\n\r\n"
    with connected(server) as raw:
        raw.sendall((head + offer + BODY) * 3 + head + offer)
        time.sleep(0.2)
        raw.sendall(BODY + last + BODY)
        text = read_all(raw)
    assert text.count(b"HTTP/1.1 200 ") == 5 == text.count(b"HTTP/1.1 ")


def test_more_requests_at_once_than_a_connection_may_have(server: Running) -> None:
    with connected(server) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 10_000)
        replies = read_all(raw).count(b"HTTP/1.1 200 ")
    assert 1000 <= replies < 10_000


# ---- too slowly


def test_a_slow_head_is_given_up(impatient: Running) -> None:
    """A byte now and then must not hold the connection for ever."""
    with connected(impatient) as raw:
        raw.settimeout(0.1)
        received = b""
        began = time.monotonic()
        for byte in HEAD * 100:
            raw.sendall(bytes([byte]))
            try:
                received = raw.recv(65536)
                break
            except TimeoutError:
                assert time.monotonic() - began < PATIENCE
        assert received.startswith(b"HTTP/1.1 408 ")


def test_a_slow_body_is_given_up(impatient: Running, caplog: pytest.LogCaptureFixture) -> None:
    with connected(impatient) as raw:
        raw.sendall(HEAD + BODY[:5])
        assert answer(raw) == (408, "request_timeout")
    assert "Traceback" not in caplog.text
    assert "without starting response" not in caplog.text


def test_a_connection_that_says_nothing_is_closed(impatient: Running) -> None:
    with connected(impatient) as raw:
        assert read_all(raw) == b""


def test_a_body_that_goes_on_after_the_reply_is_given_up(bundle_folder: Path) -> None:
    """The reply (404 here) does not wait for the body, and the body must not go on for ever."""
    with running(bundle_folder, receive_timeout=0.5) as live, connected(live) as raw:
        raw.sendall(b"DELETE /nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.settimeout(0.05)
        closed = False
        began = time.monotonic()
        while not closed:
            assert time.monotonic() - began < PATIENCE
            try:
                raw.sendall(b"1\r\nx\r\n")
                closed = raw.recv(65536) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True


def test_the_time_to_receive_is_not_the_time_to_answer(bundle_folder: Path, gate: Gate) -> None:
    """A whole request is there at once; how long the device takes is another matter."""
    with running(bundle_folder, gate, receive_timeout=0.1) as live, ThreadPoolExecutor(1) as pool:
        reply = busy(live, gate, pool)
        time.sleep(0.5)
        gate.open.set()
        assert reply.result().status_code == 200


def test_a_connection_is_kept_between_requests_for_its_own_time(bundle_folder: Path) -> None:
    """The time to receive a request does not run while there is none."""
    with running(bundle_folder, receive_timeout=0.2, keep_alive_timeout=60) as live:
        kept = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=PATIENCE)
        for _ in range(2):
            kept.request("GET", "/models")
            reply = kept.getresponse()
            assert reply.status == 200
            reply.read()
            time.sleep(0.6)
        assert kept.sock is not None
        kept.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            kept.sock.recv(1)
        kept.close()
    with running(bundle_folder, keep_alive_timeout=0.2) as live, connected(live) as raw:
        raw.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_all(raw).startswith(b"HTTP/1.1 200")


# ---- crowds


def test_a_connection_too_many_is_told_so(bundle_folder: Path) -> None:
    with running(bundle_folder, max_connections=3) as live, ExitStack() as open_ones:
        live.client.close()
        eventually(lambda: not live.server.server_state.connections, "the harness has let go")
        kept = [open_ones.enter_context(connected(live)) for _ in range(3)]
        eventually(lambda: len(live.server.server_state.connections) == 3, "all are accepted")
        with connected(live) as raw:
            text = read_all(raw)
            assert text.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in text
            assert b"too_many_connections" in text
        kept[0].close()
        eventually(lambda: len(live.server.server_state.connections) == 2, "one has left")
        assert httpx.get(f"{live.url}/healthz").status_code == 200


@pytest.mark.parametrize("more", [b"", b"no chunk\r\n"], ids=["slow", "malformed"])
def test_what_comes_behind_a_request_does_not_take_its_reply(
    bundle_folder: Path, gate: Gate, more: bytes
) -> None:
    """A second request that does not come whole, or right, while the first is computed."""
    with running(bundle_folder, gate, receive_timeout=0.3) as live, ThreadPoolExecutor() as pool:
        first = busy(live, gate, pool)
        with connected(live) as raw:
            raw.sendall(HEAD + BODY + CHUNKED + more)
            time.sleep(1.0)
            gate.open.set()
            text = read_all(raw)
        assert text.startswith(b"HTTP/1.1 200 ") and first.result().status_code == 200
        assert live.client.get("/models").status_code == 200


def test_all_requests_of_a_client_that_vanishes_are_canceled(bundle_folder: Path, gate: Gate) -> None:
    """Also the first of several that came at once, and those behind it never begin."""
    with running(bundle_folder, gate) as live:
        gate.open.clear()
        with connected(live) as raw:
            raw.sendall((HEAD + BODY) * 3)
            eventually(lambda: live.metric("dd_inflight_requests") == 1, "the first one is there")
        canceled = {"model": "tiny", "plan": "dd-1", "outcome": "canceled"}
        eventually(lambda: live.metric("dd_requests_total", **canceled) == 1, "the server notices")
        assert live.metric("dd_inflight_requests") == 0
        gate.open.set()
        assert live.post(OK).status_code == 200


# ---- who it was


@pytest.mark.parametrize(
    ("trusted", "client"),
    [("127.0.0.1", "10.0.0.7"), ("127.0.0.0/8", "10.0.0.7"), ("10.1.1.1", "127.0.0.1"), ("", "127.0.0.1")],
)
def test_only_a_trusted_proxy_names_the_client(
    bundle_folder: Path, caplog: pytest.LogCaptureFixture, trusted: str, client: str
) -> None:
    caplog.set_level(logging.INFO)
    with running(bundle_folder, trusted_proxies=trusted) as live:
        live.client.get("/models", headers={"x-forwarded-for": "10.0.0.7"})
        eventually(lambda: any(r.name == "dd_server.access" for r in caplog.records), "logged")
    [record] = [record for record in caplog.records if record.name == "dd_server.access"]
    assert record.fields["client"] == client  # type: ignore[attr-defined]


def test_a_reply_that_nobody_reads_is_given_up(impatient: Running) -> None:
    connections = impatient.server.server_state.connections
    others = set(connections)
    host, port = impatient.url.removeprefix("http://").split(":")
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 900)
        eventually(lambda: not connections <= others, "it is accepted")
        eventually(lambda: connections <= others, "it is given up")
    assert impatient.client.get("/models").status_code == 200
