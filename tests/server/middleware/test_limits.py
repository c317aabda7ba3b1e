"""Bodies: how long they may be, and how bad.

What a refusal of a body says is also in `tests.server.test_errors`.
"""

from __future__ import annotations

import anyio
import httpx
import pytest

from server.app import create_app
from server.middleware import connection
from server.settings import Settings
from tests.server.helpers import OK, Running, refused
from tests.server.middleware.sockets import (
    BODY,
    CHUNKED,
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


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/nothing", "/models"])
def test_a_body_that_is_declared_too_long_is_refused_wherever_it_goes(abused: Running, path: str) -> None:
    """Also where nobody would read it; by the length alone, before any of it comes."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 65537\r\n\r\n"
    assert refusal(say(abused, head.encode())) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/generate", "/v1/images/generations", "/admin/models"])
def test_a_body_that_comes_out_too_long_is_refused_by_every_route_that_reads_one(
    tmp_path_factory: pytest.TempPathFactory, path: str
) -> None:
    """Those that are called without the router, and those that FastAPI reads the body for."""
    keys = tmp_path_factory.mktemp("keys") / "admin"
    keys.write_text("a-key-for-the-admin-routes\n", encoding="ascii")

    async def chunks() -> object:
        for _ in range(3):
            yield b" " * 2**15

    async def ask() -> None:
        app = create_app(Settings(admin_keys_file=keys))
        app.state.dd.accepting = lambda: (None, None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            headers = {"content-type": "application/json", "x-api-key": "a-key-for-the-admin-routes"}
            reply = await client.post(path, content=chunks(), headers=headers)
            assert "65536 bytes" in refused(reply, 413, "body_too_large")
            assert reply.headers["connection"] == "close"

    anyio.run(ask)


def test_a_body_of_the_longest_length_is_read(abused: Running) -> None:
    body = BODY.ljust(65536)
    assert statuses(say(abused, post(body))) == [200]
    assert statuses(
        say(abused, CHUNKED.replace(b"host: x", b"host: x\r\nconnection: close") + in_chunks(body))
    ) == [200]


def test_a_request_behind_a_body_that_is_too_large_is_not_answered(abused: Running) -> None:
    """The connection ends with the refusal, or the rest of the body would be read as a request."""
    assert statuses(say(abused, post(b"x" * 70_000, headers="") + post())) == [413]


def test_a_chunked_body_without_end_is_cut_off(abused: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of single bytes, which costs the most to take apart."""
    monkeypatch.setattr(connection, "_LINGER_BYTES", 2**22)
    for chunks in (b"10000\r\n" + b"x" * 2**16 + b"\r\n", b"1\r\nx\r\n" * 10_000):
        with connected(abused) as raw:
            raw.sendall(CHUNKED)
            assert until_cut_off(raw, chunks) in ([], [413])


def test_nonsense_after_a_refusal_has_begun_ends_the_connection(abused: Running) -> None:
    """The body is refused as too long while it comes; what comes then is no chunk."""
    invalid = abused.metric("dd_requests_total", outcome="invalid")
    with connected(abused) as raw:
        raw.sendall(CHUNKED + b"20000\r\n" + b"x" * 0x20000)
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")
        raw.sendall(b"\r\nnot-a-size\r\n")
        rest(raw)
    assert abused.metric("dd_requests_total", outcome="invalid") == invalid + 1, (
        "and no error of the server's"
    )


def test_a_declared_body_that_does_not_come(abused: Running) -> None:
    for length in (len(BODY) + 1, 60_000, 50_000_000, 10**30):
        with connected(abused) as raw:
            raw.sendall(post(length=length))
            assert abused.post(OK).status_code == 200
            vanish(raw)


# ---- what JSON can do


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
