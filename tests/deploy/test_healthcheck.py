"""The container's health check, as the image runs it."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from server.launcher import bind
from server.settings import load_settings

SCRIPT = Path(__file__).parents[2] / "docker" / "healthcheck.py"


@pytest.fixture(params=[200, 503])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A server whose `/readyz` has this status, and its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever).start()
        yield request.param, found.server_port
        found.shutdown()


def healthy(**variables: str) -> bool:
    # A proxy that answers nobody: asked through it, every server would be ill.
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", **variables}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", ""])
def test_it_asks_the_server_itself(server: tuple[int, int], host: str) -> None:
    status, port = server
    assert healthy(DD_SERVER_HOST=host, DD_SERVER_PORT=str(port)) == (status == 200)


@pytest.mark.parametrize("host", ["::", "::1", "[::1]", "127.0.0.1", "0.0.0.0", "0", "localhost", " ::1 "])
def test_it_reaches_every_address_that_the_server_listens_on(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server binds what its settings say; the check connects to what it makes of the same variables."""
    monkeypatch.setenv("DD_SERVER_HOST", host)
    with bind(load_settings().host, 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        monkeypatch.setenv("DD_SERVER_PORT", str(port))
        found = runpy.run_path(str(SCRIPT))["address"](["dd-server", "serve"], os.environ)
        assert found[1] == load_settings().port == port
        socket.create_connection(found, timeout=2).close()


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ("serve", {}, ("127.0.0.1", 8000)),
        ("serve --port 9000", {"DD_SERVER_PORT": "8000"}, ("127.0.0.1", 9000)),
        ("serve --port=9000 --host=::", {}, ("::1", 9000)),
        ("serve --port 1 --port 2", {}, ("127.0.0.1", 2)),
        ("serve", {"dd_server_port": "9000"}, ("127.0.0.1", 9000)),
        ("serve", {"DD_SERVER_PORT": "tcp://10.0.0.7:8000"}, ("127.0.0.1", 8000)),
    ],
)
def test_a_flag_wins_over_a_variable_as_for_the_server(
    arguments: str, variables: dict[str, str], expected: tuple[str, int]
) -> None:
    assert runpy.run_path(str(SCRIPT))["address"](arguments.split(), variables) == expected


def test_a_port_that_is_none_is_not_healthy() -> None:
    assert not healthy(DD_SERVER_PORT="eighty")


def test_nobody_there_is_not_healthy() -> None:
    assert not healthy(DD_SERVER_PORT="9", DD_SERVER_HOST="::")
