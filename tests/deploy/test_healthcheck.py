"""The container's health check, as the image runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

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


def test_nobody_there_is_not_healthy() -> None:
    assert not healthy(DD_SERVER_PORT="9", DD_SERVER_HOST="::")
