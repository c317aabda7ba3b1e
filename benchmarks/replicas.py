"""Replicas of the server behind a proxy of deploy/proxy/, all on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks import report
from benchmarks.accounts import descendants
from benchmarks.client import HOST
from benchmarks.processes import environment, free_port

PROXIES = ("nginx", "haproxy")
CONFIGURATIONS = report.ROOT / "deploy" / "proxy"
_FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
_PATIENCE = 600.0  # seconds to start or to stop
# A connection for each request: one that a proxy has just closed would look like a loss.
HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)


MAX_BATCH = 4


@dataclass
class Replica:
    """One `dd-server serve` on a port of its own, which it keeps when it is started again."""

    bundle: str
    log: Path
    device: str = "cpu"
    threads: int = 1
    port: int = field(default_factory=free_port)

    def start(self) -> None:
        """Start the process; it is not ready yet."""
        command = [sys.executable, "-m", "server", "serve", self.bundle, "--host", HOST]
        command += ["--port", str(self.port), "--device", self.device, "--threads", str(self.threads)]
        command += ["--max-batch", str(MAX_BATCH)]
        # A cheaper plan would be other bytes, and a busy machine is no reason to lose a request.
        command += ["--brownout-ms", "0", "--log-level", "warning"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment(self.threads), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_until_ready(self) -> None:
        """Wait for `/readyz`.

        Raises:
            BenchmarkError: it ended, or takes too long.
        """
        stop = time.monotonic() + _PATIENCE
        while time.monotonic() < stop and self.process.poll() is None:
            try:
                if HTTP.get(f"http://{HOST}:{self.port}/readyz").is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        raise report.BenchmarkError(f"a replica did not become ready: {' / '.join(last)}")

    def restart(self, how: signal.Signals) -> None:
        """Send the process a signal, and start the next one when it has ended."""
        self.process.send_signal(how)
        self.process.wait(_PATIENCE)
        self.start()
        self.wait_until_ready()

    def device_process(self) -> int:
        """The process of its device: the one below that has none below itself, and computes the most."""
        return max((pid for pid in descendants(self.process.pid) if not descendants(pid)), key=_cpu_ticks)


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@contextmanager
def fleet(bundle: str, count: int, device: str = "cpu", threads: int = 1) -> Iterator[list[Replica]]:
    """`count` replicas, ready when the block begins."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{number}.log" for number in range(count)]
        replicas = [Replica(bundle, log, device, threads) for log in logs]
        try:
            for replica in replicas:
                replica.start()
            for replica in replicas:
                replica.wait_until_ready()
            yield replicas
        finally:
            for replica in replicas:
                if hasattr(replica, "process"):
                    _stop(replica.process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def configuration_of(proxy: str, port: int, replicas: Sequence[int], folder: Path) -> str:
    """The shipped configuration of a proxy with other ports, and with its files in `folder`.

    Args:
        replicas: ports of the replicas, instead of those of the three that it names.
    """
    text = (CONFIGURATIONS / _FILES[proxy]).read_text(encoding="utf-8")
    lines = re.findall(r"^ +server .*127\.0\.0\.1:800\d.*\n", text, re.MULTILINE)
    assert len(lines) == 3, "the shipped configuration has three replicas"
    ours = [
        re.sub(r"server (?:\w )?", "server " if proxy == "nginx" else f"server r{number} ", lines[0], count=1)
        for number in range(len(replicas))
    ]
    servers = "".join(
        line.replace("127.0.0.1:8001", f"{HOST}:{one}") for line, one in zip(ours, replicas, strict=True)
    )
    text = text.replace("".join(lines), servers)
    listening = {
        "nginx": ("listen 8080;", f"listen {HOST}:{port};"),
        "haproxy": ("bind :8080", f"bind {HOST}:{port}"),
    }
    before, after = listening[proxy]
    assert before in text
    return text.replace(before, after).replace("/tmp/dd-nginx.pid", str(folder / "nginx.pid"))


@contextmanager
def program(name: str, options: Sequence[str], folder: Path, probe: str) -> Iterator[None]:
    """A program of Debian's, which answers at the address `probe` when the block begins.

    Raises:
        BenchmarkError: it is not installed, or ended.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        target = "prometheus" if name == "prometheus" else "proxies"
        raise report.BenchmarkError(f"there is no {name} on this machine: `make {target}` installs Debian's")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([path, *options], cwd=folder, stdout=log, stderr=log)
    try:
        stop = time.monotonic() + _PATIENCE
        while not _answers(probe):
            if process.poll() is not None or time.monotonic() > stop:
                said = (folder / "log").read_text(encoding="utf-8", errors="replace")
                raise report.BenchmarkError(f"{name} does not run: {said[-400:]}")
            time.sleep(0.1)
        yield
    finally:
        _stop(process)


@contextmanager
def proxying(proxy: str, replicas: Sequence[int], port: int | None = None) -> Iterator[str]:
    """A proxy as it is shipped, before replicas on these ports; the address that it is asked at.

    Args:
        port: where it listens on the loopback interface; None = a free one.

    Raises:
        BenchmarkError: it is not installed, or ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), port or free_port()
        path = folder / _FILES[proxy]
        path.write_text(configuration_of(proxy, port, replicas, folder), encoding="utf-8")
        options = ["-c", str(path), "-g", "daemon off;"] if proxy == "nginx" else ["-db", "-f", str(path)]
        url = f"http://{HOST}:{port}"
        with program(proxy, options, folder, f"{url}/readyz"):
            yield url


def _answers(url: str) -> bool:
    try:
        return HTTP.get(url).is_success
    except httpx.HTTPError:
        return False
