"""`make fleet`: replicas, a proxy and Prometheus by the shipped configurations, until they are ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.processes import environment, free_port
from tests.benchmarks.test_fleet import needs_proxies
from tests.prometheus import needs_prometheus
from tests.server.helpers import OK, eventually
from tests.tiny import tiny_bundle


@needs_prometheus
@needs_proxies
def test_it_serves_and_is_scraped_until_it_is_ended(tmp_path: Path) -> None:
    bundle, port, page = tiny_bundle(tmp_path / "tiny"), free_port(), free_port()
    options = ["--replicas", "2", "--port", str(port), "--prometheus-port", str(page)]
    command = [sys.executable, "-m", "benchmarks.local_fleet", "--bundle", str(bundle), *options]
    log = tmp_path / "log"
    with log.open("wb") as written:
        process = subprocess.Popen(command, env=environment(1), stdout=written, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: process.poll() is not None or "Ctrl-C ends all." in log.read_text(), "it runs")
        assert process.poll() is None, log.read_text()
        with httpx.Client(trust_env=False, timeout=60) as client:
            assert client.post(f"http://127.0.0.1:{port}/generate", json=OK).status_code == 200

            def up() -> list[str]:
                found = client.get(f"http://127.0.0.1:{page}/api/v1/query", params={"query": "up"}).json()
                return [each["value"][1] for each in found["data"]["result"]]

            eventually(lambda: up() == ["1", "1"], "both replicas are scraped")
        replicas = re.findall(r"^replica \d +(\S+)$", log.read_text(), re.MULTILINE)
        assert len(replicas) == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()
        for url in (*replicas, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{page}"):
            with pytest.raises(httpx.ConnectError):
                httpx.get(url, trust_env=False)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            process.wait(120)
