"""Replicas behind the shipped configurations of nginx and HAProxy, which are run for real."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from benchmarks import fleet, replicas
from benchmarks.processes import free_port
from tests.server.helpers import OK, Gate, eventually, running
from tests.tiny import tiny_bundle

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
INSTALLED = {name: shutil.which(name, path=_PATH) for name in replicas.PROXIES}
needs_proxies = pytest.mark.skipif(
    None in INSTALLED.values(), reason="no nginx or no HAProxy here (`make proxies` installs Debian's)"
)


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.mark.parametrize("proxy", replicas.PROXIES)
@pytest.mark.parametrize("ports", [[9001], [9001, 9002, 9003, 9004]], ids=len)
def test_a_configuration_gets_the_replicas_that_there_are(
    proxy: str, ports: list[int], tmp_path: Path
) -> None:
    text = replicas.configuration_of(proxy, 9000, ports, tmp_path)
    servers = re.findall(r"^ +server .*?127\.0\.0\.1:(\d+)", text, re.MULTILINE)
    assert list(map(int, servers)) == ports
    assert "127.0.0.1:9000" in text
    assert ":8080" not in text and "listen 8080" not in text


@needs_proxies
def test_the_shipped_configurations_are_valid(tmp_path: Path) -> None:
    nginx, haproxy = (str(INSTALLED[name]) for name in replicas.PROXIES)
    for command in (
        [nginx, "-t", "-c", str(replicas.CONFIGURATIONS / "nginx.conf"), "-g", f"error_log {tmp_path}/log;"],
        [haproxy, "-c", "-f", str(replicas.CONFIGURATIONS / "haproxy.cfg")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A replica that is ready and has this status for every request (0: it ends the connection); its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if status:
                self.reply(status)

        def reply(self, status: int) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((replicas.HOST, 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


@needs_proxies
@pytest.mark.parametrize(
    ("proxy", "status"),
    [(proxy, status) for proxy in replicas.PROXIES for status in (0, 503)] + [("nginx", 429)],
)
def test_a_request_goes_on_to_the_next_replica(proxy: str, status: int) -> None:
    """From one that is not there, and one that ends the connection or refuses: also a POST."""
    with answering(200) as good, answering(status) as bad:
        ports = [free_port(), bad, good]
        with replicas.proxying(proxy, ports) as url, httpx.Client(base_url=url, trust_env=False) as client:
            replies = [client.post("/generate", json=OK, timeout=60).status_code for _ in range(12)]
    assert replies == [200] * 12


_BODY = b'{"label": 6}'
_HEAD = b"POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n"


@needs_proxies
@pytest.mark.parametrize("proxy", replicas.PROXIES)
def test_what_a_proxy_passes_on(proxy: str, bundle_folder: Path) -> None:
    """Requests with the client's address, errors, streams; no insides; that a client left, whether
    its request came in one segment or in two: HAProxy has to be told twice to look for that.
    """
    gate = Gate()
    with running(bundle_folder, gate, warmup=False) as live:
        port = int(live.url.rpartition(":")[2])
        with replicas.proxying(proxy, [port]) as url, httpx.Client(base_url=url, trust_env=False) as client:
            made, direct = client.post("/generate", json=OK, timeout=60).json(), live.post(OK).json()
            assert made["images"] == direct["images"]
            refused = client.post("/generate", json={**OK, "steps": 0})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steps")
            long = client.post("/generate", content=b" " * 70_000)
            assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")
            streamed = client.post("/generate", json=OK, headers={"accept": "text/event-stream"}, timeout=60)
            assert "event: done" in streamed.text
            inside = ("/metrics", "/metrics.html", "/admin", "/admin/models", "/%6detrics", "/%61dmin/models")
            assert {client.get(path).status_code for path in inside} == {404}
            assert client.get("/models").is_success
            gate.open.clear()
            for before, parts in enumerate(([_HEAD + _BODY], [_HEAD, _BODY])):
                with socket.create_connection((replicas.HOST, int(url.rpartition(":")[2]))) as leaving:
                    leaving.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for part in parts:
                        leaving.sendall(part)
                        time.sleep(0.1)
                    eventually(lambda: live.metric("dd_inflight_requests") == 1, "it is being handled")
                left = time.monotonic()
                eventually(lambda: live.metric("dd_inflight_requests") == 0, "it is noticed")
                assert time.monotonic() - left < 60, "noticed by the proxy's timeout alone"
                assert live.metric("dd_requests_total", outcome="canceled") == before + 1
            gate.open.set()


def test_a_proxy_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.main(["--proxies", "apache"]) == 2
    assert "none of nginx, haproxy" in capsys.readouterr().err
