"""One line for every request, in text and in JSON, that no client can forge or break."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from server.app import create_app
from server.middleware.stack import LastResort, RequestContext
from server.observability.context import context_of
from server.observability.logs import JsonFormatter, TextFormatter
from server.observability.metrics import Metrics
from server.observability.traffic import CLIENT_LEFT
from server.settings import Settings
from tests.server.helpers import OK, PATIENCE, Running, eventually, running
from tests.server.test_cli import ROOT

Lines = Callable[[], list[str]]
FORGED = "/nothing%0a%0d%1b[31m%e2%80%a8%7b%22level%22:%22forged%22%7d"


@pytest.fixture(params=["json", "text"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lines(form: str) -> Iterator[Lines]:
    """What the server's loggers write in that form, line by line as the least careful reader splits."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger = logging.getLogger("dd_server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: stream.getvalue().splitlines()
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def about_requests(written: list[str]) -> list[str]:
    return [line for line in written if "dd_server.access" in line]


def one_about(lines: Lines) -> str:
    """The line is written after the reply has been sent, so it may come a moment later."""
    eventually(lambda: bool(about_requests(lines())), "a line is logged")
    [line] = about_requests(lines())
    return line


@pytest.mark.parametrize("form", ["json"], indirect=True)
def test_a_request_is_one_object(server: Running, lines: Lines) -> None:
    reply = server.post(OK, **{"x-request-id": "mine-1"})
    line = json.loads(one_about(lines))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert 0 < line["seconds"] < PATIENCE
    expected = {
        "level": "info",
        "logger": "dd_server.access",
        "message": "POST /generate 200",
        "request_id": "mine-1",
        "method": "POST",
        "path": "/generate",
        "status": 200,
        "bytes": len(reply.content),
        "client": "127.0.0.1",
    }
    assert expected.items() <= line.items()


@pytest.mark.parametrize("form", ["text"], indirect=True)
def test_a_request_is_one_line_of_text(server: Running, lines: Lines) -> None:
    server.post(OK, **{"x-request-id": "mine-2"})
    line = one_about(lines)
    assert re.match(
        r"\S+ \S+ INFO dd_server\.access: POST /generate 200 request_id=mine-2 seconds=0\.\d+", line
    )
    assert line.count("/generate") == 1, "what the message says is not said again"


def test_a_client_cannot_break_a_line(server: Running, lines: Lines, form: str) -> None:
    """Line ends of every kind, terminal escapes and quotes in the path; ids that are not ids."""
    server.client.get(FORGED, headers={"x-request-id": 'a" level="forged'})
    line = one_about(lines)
    assert len(lines()) == 1
    assert line.isprintable()
    if form == "json":
        parsed = json.loads(line)
        assert parsed["level"] == "info"
        assert parsed["path"] == '/nothing\n\r\x1b[31m\u2028{"level":"forged"}'
        assert re.fullmatch("[0-9a-f]{32}", parsed["request_id"])
    else:
        assert 'level="forged' not in line


def test_a_raw_newline_in_an_id_never_reaches_the_log(server: Running, lines: Lines) -> None:
    """httpx would not send it, so it goes by hand; whatever the server answers, no line is forged."""
    host, port = server.url.removeprefix("http://").split(":")
    head = b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a\n{forged}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(head)
        while raw.recv(4096):
            pass
    server.client.get("/nothing")
    eventually(lambda: bool(lines()), "the request after it is logged")
    assert not any("forged" in line for line in lines())


def test_long_paths_are_cut(server: Running, lines: Lines) -> None:
    server.client.get("/" + "x" * 5000)
    assert len(one_about(lines)) < 1000


def test_query_labels_and_bodies_are_not_logged(server: Running, lines: Lines) -> None:
    server.client.post("/generate?token=told", json={"label": "told", "seed": 7})
    assert "told" not in one_about(lines)


@pytest.mark.parametrize("form", ["json"], indirect=True)
def test_probes_are_logged_only_when_they_fail(server: Running, lines: Lines) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/models"):
        assert server.client.get(path).status_code == 200
    assert json.loads(one_about(lines))["path"] == "/models"


@pytest.mark.parametrize("form", ["json"], indirect=True)
def test_the_name_of_the_key_is_logged(bundle_folder: Path, lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice:alice-0123456789abcdef", encoding="ascii")
    with running(bundle_folder, api_keys_file=tmp_path / "keys", warmup=False) as live:
        live.client.get("/models", headers={"x-api-key": "alice-0123456789abcdef"})
        assert json.loads(one_about(lines))["key"] == "alice"
    assert "0123456789abcdef" not in "".join(lines())


def test_no_lines_without_the_access_log(bundle_folder: Path, lines: Lines) -> None:
    with running(bundle_folder, access_log=False, warmup=False) as live:
        live.client.get("/models")
    assert about_requests(lines()) == []


def test_a_traceback_is_one_line_of_json_and_indented_text(
    bundle_folder: Path, lines: Lines, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("first\n2026-01-01 00:00:00,000 CRITICAL forged\u2028line\x1b[31m")

    with running(bundle_folder, warmup=False) as live:
        monkeypatch.setattr(live.state.encoder, "encode_all", broken)
        live.post(OK, **{"x-request-id": "find-me"})
        eventually(lambda: bool(about_requests(lines())), "the request is logged")
    failed = [line for line in lines() if "failed" in line]
    if form == "json":
        parsed = [json.loads(line) for line in lines()]
        [error] = [line for line in parsed if line["level"] == "error"]
        assert error["request_id"] == "find-me"
        assert error["exception"].startswith("Traceback")
        assert "forged" in error["exception"]
    else:
        assert "find-me" in failed[0]
        assert any(line.startswith("    Traceback") for line in lines())
        assert not any(line.startswith("2026-01-01 00:00:00,000") for line in lines())
    assert all(line.isprintable() for line in lines())


def ask(app: Any, path: str = "/") -> None:
    """One request to an application that is nothing but middleware and a function."""

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            await client.get(path)

    anyio.run(run)


@pytest.mark.parametrize("form", ["json"], indirect=True)
def test_what_a_route_notes_is_logged(lines: Lines) -> None:
    async def route(scope: Any, receive: Any, send: Any) -> None:
        context_of(scope).update(model="tiny", plan="dd-1", steps=1, n=2, outcome="ok", queue_ms=0.5)
        context_of(scope).update(compute_ms=1.25)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1234", "more_body": True})
        await send({"type": "http.response.body", "body": b"56"})

    ask(RequestContext(route, access_log=True, traffic=Metrics().traffic))
    facts = {"model": "tiny", "plan": "dd-1", "steps": 1, "n": 2, "outcome": "ok"}
    facts |= {"queue_ms": 0.5, "compute_ms": 1.25, "bytes": 6}
    assert facts.items() <= json.loads(one_about(lines)).items()


def test_facts_belong_to_one_request() -> None:
    """uvicorn gives every request a shallow copy of one state."""
    shared: dict[str, Any] = {}
    first, second = {"state": dict(shared)}, {"state": dict(shared)}
    context_of(first)["model"] = "tiny"
    assert context_of(second) == {}


@pytest.mark.parametrize("form", ["json"], indirect=True)
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_client_that_left_is_499(lines: Lines, cancelled: bool) -> None:
    async def route(scope: Any, receive: Any, send: Any) -> None:
        if cancelled:
            raise asyncio.CancelledError

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "client": None}
        app = RequestContext(LastResort(route), access_log=True, traffic=Metrics().traffic)
        try:
            await app(scope, None, None)  # type: ignore[arg-type]
        except asyncio.CancelledError:
            assert cancelled

    asyncio.run(run())
    line = json.loads(one_about(lines))
    assert (line["status"], line["client"]) == (CLIENT_LEFT, "")


def test_json_takes_what_is_not_text() -> None:
    """A lone surrogate, as the name of a file may have, and an object."""
    record = logging.makeLogRecord({"msg": "file \udc80", "fields": {"path": Path("a")}})
    assert json.loads(JsonFormatter().format(record))["path"] == "a"


def test_the_command_logs_nothing_but_json(bundle_folder: Path, tmp_path: Path) -> None:
    """From the start to the end, uvicorn's lines too; and no key in any of it."""
    key = "alice-0123456789abcdef"
    (tmp_path / "keys").write_text(f"alice:{key}", encoding="ascii")
    command = [sys.executable, "-m", "server", "serve", str(bundle_folder), "--port", "0", "--device", "cpu"]
    command += ["--log-format", "json", "--api-keys-file", str(tmp_path / "keys")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            written = []
            url = ""
            for line in iter(process.stderr.readline, ""):
                written.append(line)
                url = url or next(iter(re.findall(r"listening on (http://[0-9.:]+)", line)), "")
                if json.loads(line)["message"] == "ready":
                    break
            reply = httpx.post(f"{url}/generate", json=OK, headers={"x-api-key": key}, timeout=PATIENCE)
            assert reply.status_code == 200
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=30) as raw:
                raw.sendall(b"not HTTP\r\n\r\n")
                raw.recv(4096)
            process.send_signal(signal.SIGTERM)
            written += process.communicate(timeout=PATIENCE)[1].splitlines()
            assert process.returncode == 0
        finally:
            process.kill()
    parsed = [json.loads(line) for line in written]
    assert [line["key"] for line in parsed if line["logger"] == "dd_server.access"] == ["alice"]
    assert any(line["logger"] == "uvicorn.error" and line["level"] == "warning" for line in parsed)
    assert parsed[-1]["message"] == "stopped"
    assert key not in "".join(written)


def test_the_app_logs_by_default() -> None:
    assert Settings().access_log
    layers = [layer for layer in create_app(Settings()).user_middleware if layer.cls is RequestContext]
    assert [layer.kwargs["access_log"] for layer in layers] == [True]
