"""Clients that leave: what runs for them is cancelled, by one task, and nothing else is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from server.middleware.disconnect import CancelOnDisconnect
from tests.server.helpers import Gate, Running, eventually, running
from tests.server.middleware.sockets import CHUNKED, HEAD, REQUEST, connected, post, vanish
from tests.server.test_errors import OK

MANY = post(json.dumps({"label": "ship", "n": 16}).encode())
LEAVES = {"type": "http.disconnect"}
App = Callable[[Any, Any, Any], Awaitable[None]]


class Client:
    """The other side of an ASGI application: it sends parts of a body, and leaves when it is told to."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = [
            {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
            for number, part in enumerate(parts)
        ]
        self.leaves = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self._parts:
            return self._parts.pop(0)
        await self.leaves.wait()
        return LEAVES

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        await asyncio.sleep(0)

    def ask(self, app: App, path: str = "/generate", method: str = "POST") -> asyncio.Task[None]:
        scope = {"type": "http", "path": path, "method": method}
        run = CancelOnDisconnect(app)(scope, self.receive, self.send)  # type: ignore[arg-type]
        return asyncio.create_task(run)  # type: ignore[arg-type]


class Application:
    """Reads the body, then computes for ever, or streams for ever, or answers; keeps what happened."""

    def __init__(self, does: str = "computes") -> None:
        self.does = does
        self.body = b""
        self.began = asyncio.Event()
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
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while self.does == "streams":
                await send({"type": "http.response.body", "body": b"event", "more_body": True})
            if self.does == "listens":
                await receive()
            await send({"type": "http.response.body", "body": b"done"})
            await asyncio.sleep(0.05)  # closes what it opened
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@pytest.mark.parametrize("does", ["computes", "streams", "listens"])
@pytest.mark.parametrize(
    ("path", "method", "parts"),
    [
        ("/generate", "POST", (b"{}",)),
        ("/v1/images/generations", "POST", (b'{"la', b'bel": ', b"1}")),
        ("/images/receipt", "GET", ()),
        ("/images/receipt", "HEAD", (b"",)),
    ],
)
def test_what_runs_for_a_client_that_leaves_is_cancelled(
    does: str, path: str, method: str, parts: tuple[bytes, ...]
) -> None:
    """While it computes, streams, or itself waits for the client; the task ends as if it had returned."""

    async def scenario() -> None:
        app, client = Application(does), Client(*parts)
        task = client.ask(app, path, method)
        await app.began.wait()
        await asyncio.sleep(0.01)
        assert not task.done()
        client.leaves.set()
        await asyncio.wait_for(task, 5)
        assert app.cancelled and not task.cancelling()
        assert app.body == (b"".join(parts) if method == "POST" else b"")
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_client_that_leaves_in_the_middle_of_its_body() -> None:
    """The application does not see a body that is shorter than what was sent."""

    async def scenario() -> None:
        app, client = Application(), Client(b"{", b"}")
        client._parts.pop()
        client.leaves.set()
        await asyncio.wait_for(client.ask(app), 5)
        assert app.cancelled and not app.began.is_set() and client.sent == []

    asyncio.run(scenario())


@pytest.mark.parametrize("leaves", [False, True])
def test_nobody_is_cancelled_once_the_reply_is_sent(leaves: bool) -> None:
    """Servers say that the client has left where the reply is over."""

    async def scenario() -> None:
        app, client = Application("answers"), Client(b"{}")
        task = client.ask(app)
        while len(client.sent) < 2:
            await asyncio.sleep(0)
        if leaves:
            client.leaves.set()
        await asyncio.wait_for(task, 5)
        assert not app.cancelled
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


@pytest.mark.parametrize("leaves", [False, True])
def test_a_server_that_shuts_down_cancels_as_before(leaves: bool) -> None:
    """Also where the client leaves in the same moment."""

    async def scenario() -> None:
        app, client = Application(), Client(b"{}")
        task = client.ask(app)
        await app.began.wait()
        if leaves:
            client.leaves.set()
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), 5)
        assert task.cancelled()

    asyncio.run(scenario())


def test_probes_have_no_task() -> None:
    async def scenario() -> None:
        seen: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.extend([receive, send, len(asyncio.all_tasks())])

        client = Client()
        await client.ask(app, "/healthz", "GET")
        assert seen == [client.receive, client.send, 2]

    asyncio.run(scenario())


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
    with running(bundle_folder, gate) as live:
        gate.open.clear()
        with connected(live) as raw:
            raw.sendall(REQUEST * 3)
            eventually(lambda: live.metric("dd_inflight_requests") == 1, "the first one is there")
        canceled = {"model": "tiny", "plan": "dd-1", "outcome": "canceled"}
        eventually(lambda: live.metric("dd_requests_total", **canceled) == 1, "the server notices")
        assert live.metric("dd_inflight_requests") == 0
        gate.open.set()
        assert live.post(OK).status_code == 200
