"""Clients that send too much before a request is there, too slowly, do not read, or come in crowds.

Each costs a bounded amount, and the next one is answered as before.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing.managers import SyncManager
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.launcher import bind, make_server
from server.middleware import connection
from server.settings import Settings
from tests.server.helpers import OK, PATIENCE, Gate, Running, busy, eventually, running
from tests.server.middleware.conftest import gauge
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
    until_cut_off,
    vanish,
)

KEY = "a-key-0123456789"
DOCUMENTS = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 900  # 10 MB of replies


@pytest.fixture(scope="module")
def held(bundle_folder: Path, manager: SyncManager) -> Iterator[tuple[Running, Gate]]:
    """A server that waits 0.3 s for a request, and the gate before its device."""
    gate = Gate(calls=manager.list())
    with running(bundle_folder, gate, receive_timeout=0.3, warmup=False) as live:
        yield live, gate


@pytest.fixture
def impatient(held: tuple[Running, Gate]) -> Running:
    """A server that waits 0.3 s for a request."""
    return held[0]


@pytest.fixture(scope="module")
def strict(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of three connections, which are kept for 0.2 s; with long heads, and keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY, encoding="ascii")
    with running(
        bundle_folder, max_connections=3, keep_alive_timeout=0.2, max_header_bytes=65536, api_keys_file=keys
    ) as live:
        yield live


# ---- too much


@pytest.mark.parametrize(
    "head",
    [  # small enough to come in one piece with its end, and large enough not to; then without an end
        *(b"GET /models HTTP/1.1\r\nHost: x\r\nX-Bomb: " + b"x" * n + b"\r\n\r\n" for n in (20_000, 100_000)),
        b"GET /models HTTP/1.1\r\nHost: x\r\nX-Bomb: " + b"x" * 5_000_000 + b"\r\n\r\n",
        post(headers=f"x: {'a' * 100_000}\r\n"),
        post(headers="".join(f"x-{number}: {number}\r\n" for number in range(10_000))),
        b"GET /models HTTP/1.1\r\n" + b"X-More: and more\r\n" * 2000,
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["20 kB", "100 kB", "5 MB", "with a body", "many", "without an end", "path"],
)
def test_a_head_bomb_is_refused(abused: Running, head: bytes) -> None:
    """The client that sends all of it before it reads sees the reply, not a reset."""
    assert refusal(say(abused, head)) == (431, "headers_too_large")


@pytest.mark.parametrize("more", [b"a" * 10_000, b"x: a\r\n" * 2_000], ids=["header", "headers"])
def test_a_head_without_end_is_cut_off(abused: Running, monkeypatch: pytest.MonkeyPatch, more: bytes) -> None:
    monkeypatch.setattr(connection, "_LINGER_BYTES", 2**22)
    with connected(abused) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ")
        assert until_cut_off(raw, more) in ([], [431])


def test_a_head_within_the_limit_is_read(strict: Running) -> None:
    assert strict.client.get("/healthz", headers={"x-large": "x" * 40_000}).status_code == 200


def test_what_is_refused_twice_gets_one_reply(strict: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Both the protocol and the application (401) have an answer, in the same moment."""
    assert refusal(say(strict, CHUNKED + b"not-a-size\r\n")) == (400, "invalid_http")
    assert strict.client.get("/healthz").status_code == 200
    assert "Traceback" not in caplog.text


# ---- too slowly


def test_a_request_that_comes_byte_by_byte_is_answered(abused: Running) -> None:
    with connected(abused) as raw:
        for number, byte in enumerate(post()):
            raw.sendall(bytes([byte]))
            if number % 40 == 0:
                assert abused.post(OK).status_code == 200, "others must not wait for it"
            time.sleep(0.002)
        assert statuses(rest(raw)) == [200]


def test_silent_connections_keep_nobody_out(abused: Running) -> None:
    with ExitStack() as silent:
        for number in range(200):
            raw = silent.enter_context(connected(abused))
            raw.sendall(REQUEST[: number % len(REQUEST)])
        assert abused.post(OK).status_code == 200


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
    assert refusal(say(impatient, HEAD + BODY[:5])) == (408, "request_timeout")
    assert "Traceback" not in caplog.text
    assert "without starting response" not in caplog.text


def test_trailers_without_end_are_given_up(impatient: Running) -> None:
    with connected(impatient) as raw:
        raw.sendall(CHUNKED + in_chunks(BODY).removesuffix(b"\r\n"))
        began = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - began < PATIENCE:
                raw.sendall(b"X-More: and more\r\n" * 100)
        assert time.monotonic() - began < PATIENCE


def test_one_trailer_without_end_is_cut_off(abused: Running) -> None:
    """The parser keeps what has come of it, and copies it with every read."""
    with connected(abused) as raw:
        raw.sendall(CHUNKED + in_chunks(BODY).removesuffix(b"\r\n") + b"X: ")
        with suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(64):
                raw.sendall(b"a" * 2**16)
        assert refusal(rest(raw)) == (431, "headers_too_large")


def test_many_requests_before_a_body_are_not_taken_for_trailers(abused: Running) -> None:
    """In one read, which ends where the body of the last would begin."""
    with connected(abused) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 900 + post().removesuffix(BODY))
        time.sleep(0.2)
        raw.sendall(BODY)
        assert statuses(rest(raw)) == [200] * 901


def test_a_connection_that_says_nothing_is_closed(impatient: Running) -> None:
    assert say(impatient, b"") == b""


def test_a_body_that_goes_on_after_the_reply_is_given_up(impatient: Running) -> None:
    """The reply (404 here) does not wait for the body, and the body must not go on for ever."""
    with connected(impatient) as raw:
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


def test_the_time_to_receive_is_not_the_time_to_answer(held: tuple[Running, Gate]) -> None:
    """A whole request is there at once; how long the device takes is another matter."""
    live, gate = held
    with ThreadPoolExecutor(1) as pool:
        reply = busy(live, gate, pool)
        time.sleep(0.6)
        gate.open.set()
        assert reply.result().status_code == 200


@pytest.mark.parametrize("more", [b"", b"no chunk\r\n"], ids=["slow", "malformed"])
def test_what_comes_behind_a_request_does_not_take_its_reply(held: tuple[Running, Gate], more: bytes) -> None:
    """A second request that does not come whole, or right, while the first is computed."""
    live, gate = held
    with ThreadPoolExecutor() as pool:
        first = busy(live, gate, pool)
        with connected(live) as raw:
            raw.sendall(REQUEST + CHUNKED + more)
            time.sleep(0.7)
            gate.open.set()
            text = rest(raw)
        assert text.startswith(b"HTTP/1.1 200 ") and first.result().status_code == 200
        assert live.client.get("/models").status_code == 200


def test_a_connection_is_kept_between_requests_for_its_own_time(impatient: Running, strict: Running) -> None:
    """The time to receive a request does not run while there is none."""
    kept = http.client.HTTPConnection(impatient.url.removeprefix("http://"), timeout=PATIENCE)
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
    for empty_line in (b"", b"\r\n"):
        assert statuses(say(strict, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + empty_line)) == [200]


def test_an_empty_line_does_not_hold_a_connection(strict: Running) -> None:
    assert say(strict, b"\r\n") == b""


def test_the_end_of_a_body_that_nobody_read_does_not_hold_a_connection(strict: Running) -> None:
    """Its reply (401 here) has gone out before; the time to keep the connection begins again behind it."""
    with connected(strict) as raw:
        raw.sendall(CHUNKED)
        assert raw.recv(65536).startswith(b"HTTP/1.1 401 ")
        raw.sendall(b"0\r\n\r\n")
        assert statuses(rest(raw)) == []


# ---- clients that do not read


def test_a_client_that_never_reads_keeps_nobody_out(abused: Running) -> None:
    """Its replies fill the system's buffers; the server must neither wait nor hoard them."""
    memory = gauge(abused, "process_resident_memory_bytes")
    with connected(abused, receive_buffer=4096) as raw:
        raw.setblocking(False)
        sent = raw.send(DOCUMENTS)
        assert sent > 0
        raw.settimeout(PATIENCE)
        for _ in range(20):
            assert abused.post(OK).status_code == 200
        assert gauge(abused, "process_resident_memory_bytes") < memory + 30e6
        vanish(raw)


def test_a_reply_that_nobody_reads_is_given_up(impatient: Running) -> None:
    connections = impatient.server.server_state.connections
    others = set(connections)
    with connected(impatient, receive_buffer=4096) as raw:
        raw.sendall(DOCUMENTS)
        eventually(lambda: not connections <= others, "it is accepted")
        eventually(lambda: connections <= others, "it is given up")
    assert impatient.client.get("/models").status_code == 200


def test_the_last_bytes_of_a_reply_that_nobody_reads_are_given_up(impatient: Running) -> None:
    """Fewer than asyncio would call too many: the kernel has taken all but those."""
    connections = impatient.server.server_state.connections
    others = set(connections)
    with connected(impatient, receive_buffer=4096) as raw:
        left = 0
        for _ in range(5000):
            raw.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n")
            time.sleep(0.001)
            left = max(c.transport.get_write_buffer_size() for c in connections - others)
            if left:
                break
        assert 0 < left < 2**16
        eventually(lambda: connections <= others, "it is given up")
    assert impatient.client.get("/models").status_code == 200


def test_a_refusal_is_read_though_connections_are_not_kept(strict: Running) -> None:
    """What the client still sends is dropped, for longer than an idle connection is kept."""
    with connected(strict) as raw:
        raw.sendall(post(headers=f"authorization: Bearer {KEY}\r\n", length=50_000_000).removesuffix(BODY))
        for _ in range(6):
            time.sleep(0.1)
            raw.sendall(b"x" * 1000)
        assert refusal(rest(raw)) == (413, "body_too_large")


# ---- crowds


def test_a_connection_too_many_is_told_so(strict: Running) -> None:
    connections = strict.server.server_state.connections
    eventually(lambda: not connections, "the harness has let go")
    with ExitStack() as open_ones:
        kept = [open_ones.enter_context(connected(strict)) for _ in range(3)]
        eventually(lambda: len(connections) == 3, "all are accepted")
        with connected(strict) as raw:
            text = rest(raw)
        assert refusal(text) == (503, "too_many_connections")
        assert b"retry-after: 1" in text
        kept[0].close()
        eventually(lambda: len(connections) == 2, "one has left")
        assert httpx.get(f"{strict.url}/healthz").status_code == 200


# ---- who it was


@pytest.mark.parametrize(
    ("trusted", "client"),
    [("127.0.0.1", "10.0.0.7"), ("127.0.0.0/8", "10.0.0.7"), ("10.1.1.1", "127.0.0.1"), ("", "127.0.0.1")],
)
def test_only_a_trusted_proxy_names_the_client(
    caplog: pytest.LogCaptureFixture, trusted: str, client: str
) -> None:
    """Asked of the application as uvicorn runs it, before a model is loaded."""
    caplog.set_level(logging.INFO)
    with bind("127.0.0.1", 0) as bound:
        settings = Settings(trusted_proxies=trusted)
        config = make_server(create_app(settings, []), settings, bound).config
    config.load()

    async def ask() -> None:
        transport = httpx.ASGITransport(config.loaded_app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as asking:
            await asking.get("/models", headers={"x-forwarded-for": "10.0.0.7"})

    asyncio.run(ask())
    [record] = [record for record in caplog.records if record.name == "dd_server.access"]
    assert record.fields["client"] == client  # type: ignore[attr-defined]
