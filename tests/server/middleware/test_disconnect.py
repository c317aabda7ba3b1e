"""Clients that leave: what runs for them is cancelled, and nothing else is."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from server.launcher import bind
from server.middleware.connection import protocol
from server.observability.metrics import Metrics
from server.settings import Settings
from tests.server.helpers import OK, PATIENCE, Gate, Running, eventually, running
from tests.server.middleware.sockets import (
    CHUNKED,
    HEAD,
    REQUEST,
    connected,
    connected_to,
    post,
    rest,
    vanish,
)

MANY = post(json.dumps({"label": "ship", "n": 16}).encode())


class Application:
    """Read the body, then compute for ever, stream for ever, or answer; keep what happened."""

    def __init__(self, does: str = "computes") -> None:
        self.does = does
        self.body = b""
        self.began = threading.Event()
        self.ended = threading.Event()
        self.cancelled = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            more = scope["method"] == "POST"
            while more:
                message = await receive()
                self.body += message["body"]
                more = message["more_body"]
            self.began.set()
            if self.does == "computes":
                await asyncio.Event().wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
            if self.does == "listens":
                await receive()
                await asyncio.Event().wait()
            await send({"type": "http.response.body", "body": b"done"})
            await asyncio.sleep(0.05)  # closes what it opened
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()


@contextmanager
def serving(app: Any) -> Iterator[tuple[uvicorn.Server, tuple[str, int]]]:
    """uvicorn with our protocol, in a thread."""
    with bind("127.0.0.1", 0) as bound:
        config = uvicorn.Config(
            app,
            http=protocol(Settings(), Metrics()),
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            eventually(lambda: server.started, "it listens")
            yield server, bound.getsockname()
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def asked(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("does", ["computes", "listens"])
@pytest.mark.parametrize(
    ("path", "method"),
    [("/generate", "POST"), ("/v1/images/generations", "POST"), ("/images/r", "GET"), ("/images/r", "HEAD")],
)
def test_what_runs_for_a_client_that_leaves_is_cancelled(
    does: str, path: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While it computes, or waits between two parts of its reply; the task ends as if it had returned."""
    app = Application(does)
    with serving(app) as (_, address):
        with connected_to(address) as raw:
            raw.sendall(asked(method, path, b"{}"))
            assert app.began.wait(PATIENCE)
        assert app.ended.wait(PATIENCE)
    assert app.cancelled and app.body == (b"{}" if method == "POST" else b"")
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_client_that_leaves_in_the_middle_of_its_body() -> None:
    """The application does not see a body that is shorter than what was sent."""
    app = Application()
    with serving(app) as (_, address):
        with connected_to(address) as raw:
            raw.sendall(asked("POST", "/generate", b"{}")[:-1])
            eventually(lambda: app.body == b"{", "the first part is read")
        assert app.ended.wait(PATIENCE)
    assert app.cancelled and not app.began.is_set()


def test_nobody_is_cancelled_once_the_reply_is_sent() -> None:
    app = Application("answers")
    with serving(app) as (_, address):
        with connected_to(address) as raw:
            raw.sendall(asked("POST", "/generate", b"{}"))
            assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        assert app.ended.wait(PATIENCE)
    assert not app.cancelled


def test_other_requests_of_a_client_that_leaves_go_on() -> None:
    """To load a model, for example: the client may ask later what became of it."""
    app = Application()
    with serving(app) as (_, address):
        with connected_to(address) as raw:
            raw.sendall(asked("POST", "/admin/models", b"{}"))
            assert app.began.wait(PATIENCE)
        assert not app.ended.wait(0.2)


def test_a_server_that_shuts_down_cancels_as_before(caplog: pytest.LogCaptureFixture) -> None:
    app = Application()
    with serving(app) as (server, address), connected_to(address) as raw:
        raw.sendall(asked("POST", "/generate", b"{}"))
        assert app.began.wait(PATIENCE)
        server.should_exit = True
        rest(raw)
    assert app.cancelled
    assert "CancelledError" in caplog.text


# ---- over HTTP


@pytest.mark.parametrize(
    "sent", [0, 1, len(HEAD) // 2, len(HEAD) - 1, len(HEAD), len(HEAD) + 3, len(REQUEST) - 1, len(REQUEST)]
)
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed"])
def test_clients_that_vanish_while_they_ask(abused: Running, sent: int, reset: bool) -> None:
    for _ in range(5):
        with connected(abused) as raw:
            raw.sendall(REQUEST[:sent])
            if reset:
                vanish(raw)


def test_a_client_that_vanishes_from_a_chunked_body(abused: Running) -> None:
    for tail in (b"", b"5", b"5\r\n", b'5\r\n{"lab', b'5\r\n{"lab\r\n', b"0\r\n"):
        with connected(abused) as raw:
            raw.sendall(CHUNKED + tail)
            vanish(raw)


def test_a_client_that_does_not_read_its_image_leaves_no_request_behind(abused: Running) -> None:
    with connected(abused, receive_buffer=4096) as raw:
        raw.sendall(MANY)
        assert abused.post(OK).status_code == 200
        vanish(raw)


def test_clients_that_vanish_while_they_are_answered(abused: Running) -> None:
    for _ in range(5):
        with connected(abused, receive_buffer=4096) as raw:
            raw.sendall(MANY)
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
            vanish(raw)


def test_pipelined_requests_of_a_client_that_vanishes(abused: Running) -> None:
    with connected(abused) as raw:
        raw.sendall(REQUEST * 50)
        raw.recv(1)
        vanish(raw)


def test_all_requests_of_a_client_that_vanishes_are_canceled(bundle_folder: Path, gate: Gate) -> None:
    """Also the first of several that came at once, and those behind it never begin."""
    with running(bundle_folder, gate, warmup=False) as live:
        gate.open.clear()
        with connected(live) as raw:
            raw.sendall(REQUEST * 3)
            eventually(lambda: live.metric("dd_inflight_requests") == 1, "the first one is there")
        canceled = {"model": "tiny", "plan": "dd-1", "outcome": "canceled"}
        eventually(lambda: live.metric("dd_requests_total", **canceled) == 1, "the server notices")
        assert live.metric("dd_inflight_requests") == 0
        gate.open.set()
        assert live.post(OK).status_code == 200
