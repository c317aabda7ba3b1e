"""Clients that are slow, vanish, flood or do not speak HTTP: the server answers the next one as before.

Only sockets and HTTP here, nothing of the server's inside. What a well-formed but wrong request gets
is in `test_errors`.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from server.middleware import connection
from tests.server.helpers import Running, eventually
from tests.server.test_errors import refused

OK = {"label": "ship", "seed": 7}
BODY = json.dumps(OK).encode()
TIMEOUT = 60.0


def post(body: bytes = BODY, headers: str = "connection: close\r\n", length: int | None = None) -> bytes:
    """A request for an image as it goes over the wire."""
    size = len(body) if length is None else length
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n"
    )
    return head.encode() + headers.encode() + b"\r\n" + body


@contextmanager
def connected(live: Running, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.socket() as raw:
        if receive_buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(TIMEOUT)
        raw.connect((host, int(port)))
        yield raw


REQUEST = post(headers="")
HEAD = len(REQUEST) - len(BODY)


def vanish(raw: socket.socket) -> None:
    """Close with a reset, as a process that is killed or a cable that is cut."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def rest(raw: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = bytearray()
    with suppress(ConnectionResetError):  # it closed before it had read everything
        while data := raw.recv(65536):
            received += data
    return bytes(received)


def statuses(replies: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", replies)]


def say(live: Running, data: bytes) -> list[int]:
    """Sends bytes; the statuses of what comes back until the server closes."""
    with connected(live) as raw:
        with suppress(BrokenPipeError, ConnectionResetError):  # it had heard enough
            raw.sendall(data)
        return statuses(rest(raw))


def _gauge(live: Running, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", live.client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.fixture
def abused(server: Running, caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    """A server that must be as before when the test is over: it answers, nothing is left over, no error
    was logged.
    """
    yield server
    reply = server.post(OK)
    assert reply.status_code == 200
    eventually(lambda: _gauge(server, "dd_inflight_requests") == 0, "no request is left over")
    eventually(lambda: _gauge(server, "dd_queue_depth") == 0, "no image is left over")
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [r.getMessage() for r in records if r.levelno >= logging.ERROR] == []


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


def test_a_client_that_never_reads_keeps_nobody_out(abused: Running) -> None:
    """Its replies (10 MB) fill the system's buffers; the server must neither wait nor hoard them."""
    memory = _gauge(abused, "process_resident_memory_bytes")
    with connected(abused, receive_buffer=4096) as raw:
        raw.setblocking(False)
        request = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
        sent = raw.send(request * 900)
        assert sent > 0
        raw.settimeout(TIMEOUT)
        for _ in range(20):
            assert abused.post(OK).status_code == 200
        assert _gauge(abused, "process_resident_memory_bytes") < memory + 30e6
        vanish(raw)


def test_a_client_that_does_not_read_its_image_leaves_no_request_behind(abused: Running) -> None:
    many = json.dumps({"label": "ship", "n": 16}).encode()
    with connected(abused, receive_buffer=4096) as raw:
        raw.sendall(post(many))
        assert abused.post(OK).status_code == 200
        vanish(raw)


@pytest.mark.parametrize("sent", [0, 1, HEAD // 2, HEAD - 1, HEAD, HEAD + 3, len(REQUEST) - 1, len(REQUEST)])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_clients_that_vanish_while_they_ask(abused: Running, sent: int, reset: bool) -> None:
    for _ in range(5):
        with connected(abused) as raw:
            raw.sendall(REQUEST[:sent])
            if reset:
                vanish(raw)


def test_clients_that_vanish_while_they_are_answered(abused: Running) -> None:
    many = json.dumps({"label": "ship", "n": 16}).encode()
    for _ in range(5):
        with connected(abused, receive_buffer=4096) as raw:
            raw.sendall(post(many))
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
            vanish(raw)


def test_a_client_that_vanishes_from_a_chunked_body(abused: Running) -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    for tail in (b"", b"5", b"5\r\n", b'5\r\n{"lab', b'5\r\n{"lab\r\n', b"0\r\n"):
        with connected(abused) as raw:
            raw.sendall(head + tail)
            vanish(raw)


def test_a_header_of_100_kb(abused: Running) -> None:
    """Whether it is read depends on how it arrives; that others are answered does not."""
    assert set(say(abused, post(headers=f"connection: close\r\nx: {'a' * 100_000}\r\n"))) <= {200, 400, 431}


def until_cut_off(raw: socket.socket, data: bytes) -> None:
    """Sends `data` again and again; fails if the server takes 64 MiB of it."""
    for _ in range(-(-(2**26) // len(data))):
        try:
            raw.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return
    pytest.fail("the server never closed the connection")


def test_a_header_without_end_is_cut_off(abused: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LINGER_BYTES", 2**22)
    with connected(abused) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ")
        until_cut_off(raw, b"a" * 10_000)
        assert statuses(rest(raw)) in ([], [400], [431])  # a reset may overtake the reply


def test_headers_without_end_are_cut_off(abused: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LINGER_BYTES", 2**22)
    with connected(abused) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
        until_cut_off(raw, b"x: a\r\n" * 2_000)
        assert statuses(rest(raw)) in ([], [400], [431])


def test_ten_thousand_headers(abused: Running) -> None:
    headers = "".join(f"x-{number}: {number}\r\n" for number in range(10_000))
    assert set(say(abused, post(headers="connection: close\r\n" + headers))) <= {200, 400, 431}


def test_a_chunked_body_without_end_is_cut_off(abused: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of single bytes, which costs the most to take apart."""
    monkeypatch.setattr(connection, "_LINGER_BYTES", 2**22)
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    for chunks in (b"10000\r\n" + b"x" * 2**16 + b"\r\n", b"1\r\nx\r\n" * 10_000):
        with connected(abused) as raw:
            raw.sendall(head)
            until_cut_off(raw, chunks)
            assert statuses(rest(raw)) in ([], [413])  # a reset may overtake the reply


def test_a_declared_body_that_does_not_come(abused: Running) -> None:
    for length in (len(BODY) + 1, 60_000, 50_000_000, 10**30):
        with connected(abused) as raw:
            raw.sendall(post(length=length))
            assert abused.post(OK).status_code == 200
            vanish(raw)


# Folding its case makes three characters of it.
LONGEST_FOLDED = "\N{LATIN SMALL LIGATURE FFI}"


def _nested(opening: str, inside: str, closing: str, depth: int) -> bytes:
    return (opening * depth + inside + closing * depth).encode()


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [  # numbers of more than 4,300 digits are no JSON to the parser
        (b'{"label": ' + _nested("[", "", "]", 100) + b"}", "invalid_request", "label"),
        (b'{"label": ' + _nested("[", "", "]", 30_000) + b"}", "invalid_json", None),
        (_nested('{"label":', "1", "}", 5_000), "invalid_json", None),
        (b'{"prompt": ' + _nested('[{"a":', "1", "}]", 7_000) + b"}", "invalid_json", None),
        (b'{"label": 1, "seed": ' + b"9" * 4_000 + b"}", "invalid_request", "seed"),
        (b'{"label": 1, "seed": ' + b"9" * 60_000 + b"}", "invalid_json", None),
        (b'{"label": 1, "seed": -' + b"9" * 4_300 + b"}", "invalid_request", "seed"),
        (b'{"label": ' + b"9" * 4_300 + b"}", "invalid_request", "label"),
        (b'{"label": ' + b"9" * 4_301 + b"}", "invalid_json", None),
        (b'{"label": ' + b"9" * 60_000 + b"}", "invalid_json", None),
        (b'{"label": 1, "steps": ' + b"9" * 4_300 + b"}", "invalid_request", "steps"),
        (b'{"label": 1, "steps": -' + b"9" * 4_300 + b"}", "invalid_request", "steps"),
        (b'{"label": 1, "steps": ' + b"9" * 60_000 + b"}", "invalid_json", None),
        (b'{"label": 1, "n": ' + b"9" * 4_300 + b"}", "invalid_request", "n"),
        (b'{"label": 1, "n": ' + b"9" * 60_000 + b"}", "invalid_json", None),
        (b'{"label": 1, "n": 1e400}', "invalid_request", "n"),
        (b'{"label": 1, "steps": NaN}', "invalid_request", "steps"),
        (b'{"label": 1, "steps": -Infinity}', "invalid_request", "steps"),
        (b'{"label": "\\u0000"}', "invalid_request", "label"),
        ('{"label": "' + LONGEST_FOLDED * 20_000 + '"}', "invalid_request", "label"),
        (b'{"label": 1, "model": "' + b"m" * 60_000 + b'"}', "unknown_model", "model"),
        (b'{"label": 1, "\\n\\u2028": 1}', "invalid_request", "\n\u2028"),
    ],
)  # fmt: skip
def test_a_body_made_to_hurt_is_refused(
    abused: Running, body: bytes | str, code: str, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else body.encode()
    reply = abused.client.post("/generate", content=content, headers={"content-type": "application/json"})
    refused(reply, 404 if code == "unknown_model" else 400, code, param)


def test_a_body_of_spaces_or_repetitions_means_what_it_says(abused: Running) -> None:
    same = b'{"label": 1, ' + b'"steps": 64, ' * 4_000 + b'"steps": 1}'
    for body in (b" " * 60_000 + BODY, same):
        reply = abused.client.post("/generate", content=body, headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["plan"]) == (200, "dd-1")


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
    with connected(abused) as raw:
        raw.sendall(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        head, _, body = rest(raw).partition(b"\r\n\r\n")
    assert statuses(head) == [status]
    error = json.loads(body)["error"]
    assert (
        error["code"] == {404: "not_found", 431: "headers_too_large"}[status] and len(error["message"]) < 400
    )


def test_a_method_made_to_hurt_is_refused(abused: Running) -> None:
    with connected(abused) as raw:
        raw.sendall(b"A" * 60_000 + b" /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        head, _, body = rest(raw).partition(b"\r\n\r\n")
    assert statuses(head) == [400]
    assert len(json.loads(body)["error"]["message"]) < 400


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
        (f"{GET}no colon\r\n\r\n".encode(), [400]),
        (f"{GET}upgrade: h2c\r\nconnection: upgrade\r\n\r\n".encode(), [200]),
        (f"{GET}upgrade: websocket\r\nconnection: upgrade\r\n\r\n".encode(), [200]),
        (f"{GET}expect: 200-maybe\r\n\r\n".encode(), [200]),
        (f"{GET}\r\n".encode().replace(b"\r", b""), [400]),
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
    assert say(abused, data) == expected


@pytest.mark.parametrize("data", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/9.9\r\nhost: x\r\n\r\n"])
def test_another_http(abused: Running, data: bytes) -> None:
    """Parsers differ in what they make of another version; none of them must fail on it."""
    with connected(abused) as raw:
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)
        assert all(status < 500 for status in statuses(rest(raw)))


@pytest.mark.parametrize("chunks", [b"xyz\r\n", b"-1\r\n", b"5\r\nabcdefgh\r\n", b"f" * 64 + b"\r\n"])
def test_chunks_that_are_none(abused: Running, chunks: bytes) -> None:
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert say(abused, head + chunks) == [400]


def test_chunks_that_are_none_after_the_refusal(abused: Running) -> None:
    """The reply is under way, waiting for the rest of a body that turns out to be nonsense."""
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    with connected(abused) as raw:
        raw.sendall(head + b"20000\r\n" + b"x" * 2**17 + b"\r\n")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")
        raw.sendall(b"nonsense\r\n")
        rest(raw)


def test_a_length_and_chunks_at_once_is_one_request(abused: Running) -> None:
    """Two readings of one message are how requests are smuggled past a proxy."""
    hidden = b"GET /hidden HTTP/1.1\r\nhost: x\r\n\r\n"
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n"
    found = say(abused, head + b"connection: close\r\n\r\n" + chunked + hidden)
    assert found in ([200], [400])


def test_pipelined_requests_are_answered_in_order(abused: Running) -> None:
    """The dear one first: its answer still comes before the cheap ones'."""
    bodies = [{"label": 1, "seed": 0, "steps": 64}, {"label": 2, "seed": 0}, {"label": "nothing"}, OK]
    data = b""
    for number, body in enumerate(bodies):
        close = "connection: close\r\n" if number == len(bodies) - 1 else ""
        data += post(json.dumps(body).encode(), headers=f"x-request-id: r{number}\r\n{close}")
    with connected(abused) as raw:
        raw.sendall(data)
        replies = rest(raw)
    assert statuses(replies) == [200, 200, 400, 200]
    assert re.findall(rb"x-request-id: (r\d)", replies) == [b"r0", b"r1", b"r2", b"r3"]


def test_pipelined_requests_of_a_client_that_vanishes(abused: Running) -> None:
    with connected(abused) as raw:
        raw.sendall(post(headers="") * 50)
        raw.recv(1)
        vanish(raw)


def test_a_request_behind_a_body_that_is_too_large_is_not_answered(abused: Running) -> None:
    """The connection ends with the refusal, or the rest of the body would be read as a request."""
    with connected(abused) as raw:
        raw.sendall(post(b"x" * 70_000, headers="") + post())
        assert statuses(rest(raw)) == [413]
