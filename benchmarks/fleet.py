"""Replicas behind the proxies of deploy/proxy/ under load, while replicas and device processes are killed.

    clients → nginx or HAProxy → replicas   ← kill −9, rolling SIGTERM, kill −9 of a device process

A request is lost if its reply is not 200, or not the image that its seed makes; nobody tries again but the
proxy and the server. Every replica must make the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import report
from benchmarks.accounts import descendants
from benchmarks.client import HOST
from benchmarks.processes import environment, free_port, server_configuration
from dd_core.errors import InvalidRequestError

THEME = "fleet"
PROXIES = ("nginx", "haproxy")
CONFIGURATIONS = report.ROOT / "deploy" / "proxy"
_FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
_SMOKE = ("--replicas", "2", "--clients", "2", "--seconds", "1", "--proxies", "nginx")
_PATIENCE = 600.0  # seconds to start or to stop
_SEEDS = 8
_Event = Callable[["Fleet"], None]
# A connection for each request: one that a proxy has just closed would look like a loss.
_HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)


@dataclass
class Replica:
    """One `dd-server serve` on a port of its own, which it keeps when it is started again."""

    bundle: str
    log: Path
    port: int = field(default_factory=free_port)

    def start(self) -> None:
        """Start the process; it is not ready yet."""
        command = [sys.executable, "-m", "server", "serve", self.bundle, "--host", HOST]
        command += ["--port", str(self.port), "--device", "cpu", "--threads", "1", "--max-batch", "4"]
        # A cheaper plan would be other bytes, and a busy machine is no reason to lose a request.
        command += ["--brownout-ms", "0", "--log-level", "warning"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment(1), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_until_ready(self) -> None:
        """Wait for `/readyz`.

        Raises:
            BenchmarkError: it ended, or takes too long.
        """
        stop = time.monotonic() + _PATIENCE
        while time.monotonic() < stop and self.process.poll() is None:
            try:
                if _HTTP.get(f"http://{HOST}:{self.port}/readyz").is_success:
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


@dataclass
class Fleet:
    """Replicas that are ready."""

    replicas: list[Replica]


@contextmanager
def fleet(bundle: str, count: int) -> Iterator[Fleet]:
    """`count` replicas, ready when the block begins."""
    with tempfile.TemporaryDirectory() as folder:
        replicas = [Replica(bundle, Path(folder) / f"{number}.log") for number in range(count)]
        try:
            for replica in replicas:
                replica.start()
            for replica in replicas:
                replica.wait_until_ready()
            yield Fleet(replicas)
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
def proxying(proxy: str, replicas: Sequence[int]) -> Iterator[str]:
    """A proxy as it is shipped, before replicas on these ports; the address that it is asked at.

    Raises:
        BenchmarkError: it is not installed, or ended.
    """
    program = shutil.which(proxy, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise report.BenchmarkError(f"there is no {proxy} on this machine: `make proxies` installs Debian's")
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        path = folder / _FILES[proxy]
        path.write_text(configuration_of(proxy, port, replicas, folder), encoding="utf-8")
        options = ["-c", str(path), "-g", "daemon off;"] if proxy == "nginx" else ["-db", "-f", str(path)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([program, *options], stdout=log, stderr=log)
        url = f"http://{HOST}:{port}"
        try:
            stop = time.monotonic() + _PATIENCE
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > stop:
                    said = (folder / "log").read_text(encoding="utf-8", errors="replace")
                    raise report.BenchmarkError(f"{proxy} does not run: {said[-400:]}")
                time.sleep(0.1)
            yield url
        finally:
            _stop(process)


def _answers(url: str) -> bool:
    try:
        return _HTTP.get(f"{url}/readyz").is_success
    except httpx.HTTPError:
        return False


def body(seed: int) -> dict[str, Any]:
    """The request of a seed."""
    return {"label": seed % 10, "seed": seed}


def picture(url: str, seed: int) -> bytes:
    """The image of a seed.

    Raises:
        BenchmarkError: the reply is none.
    """
    try:
        reply = _HTTP.post(f"{url}/generate", json=body(seed), headers={"accept": "image/png"})
    except httpx.HTTPError as error:
        raise report.BenchmarkError(f"{type(error).__name__}: {error}") from error
    if reply.status_code != 200:
        raise report.BenchmarkError(f"status {reply.status_code}: {reply.text[:200]}")
    return reply.content


@dataclass
class Clients:
    """Closed-loop clients of one address; what became of their requests."""

    url: str
    expected: Sequence[bytes]  # the image of each seed
    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """Ask all the time until the block ends."""
        over, turns = threading.Event(), itertools.count()
        threads = [threading.Thread(target=self._ask, args=(over, turns)) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def _ask(self, over: threading.Event, turns: Iterator[int]) -> None:
        while not over.is_set():
            seed, began = next(turns) % len(self.expected), time.perf_counter()
            try:
                if picture(self.url, seed) != self.expected[seed]:
                    self.lost.append("other bytes")
            except report.BenchmarkError as error:
                self.lost.append(error.message)
            self.seconds.append(time.perf_counter() - began)


def kill(found: Fleet) -> None:
    """One replica is killed, and started again."""
    found.replicas[0].restart(signal.SIGKILL)


def roll(found: Fleet) -> None:
    """Every replica in turn is asked to end, and started again."""
    for replica in found.replicas:
        replica.restart(signal.SIGTERM)


def kill_device(found: Fleet) -> None:
    """The device process of one replica is killed; the replica starts another."""
    pid = found.replicas[-1].device_process()
    os.kill(pid, signal.SIGKILL)
    found.replicas[-1].wait_until_ready()


EVENTS: dict[str, _Event] = {
    "kill -9 of a replica": kill,
    "rolling restart": roll,
    "kill -9 of a device process": kill_device,
}


def measure(chosen: argparse.Namespace, found: Fleet, results: dict[str, Any]) -> None:
    """Fill `results`: for each proxy and event the requests, those lost, and the latencies."""
    urls = [f"http://{HOST}:{replica.port}" for replica in found.replicas]
    expected = [picture(urls[0], seed) for seed in range(_SEEDS)]
    results["rows"] = []
    for url in urls[1:]:
        if [picture(url, seed) for seed in range(_SEEDS)] != expected:
            results["failures"].append("two replicas make other bytes of one seed")
    for proxy in chosen.proxies:
        with proxying(proxy, [replica.port for replica in found.replicas]) as url:
            for name, event in EVENTS.items():
                clients = Clients(url, expected)
                with clients.running(chosen.clients):
                    time.sleep(chosen.seconds)
                    event(found)
                    time.sleep(chosen.seconds)
                row = {
                    "proxy": proxy,
                    "event": name,
                    "requests": len(clients.seconds),
                    "lost": len(clients.lost),
                    "p50_ms": 1e3 * report.percentile(clients.seconds, 50),
                    "p99_ms": 1e3 * report.percentile(clients.seconds, 99),
                    "longest_ms": 1e3 * max(clients.seconds),
                }
                results["rows"].append(row)
                if clients.lost:
                    told = sorted(set(clients.lost))[:3]
                    results["failures"].append(f"{proxy}, {name}: {row['lost']} lost: {'; '.join(told)}")


_COLUMNS = {
    "proxy": "{proxy}",
    "while": "{event}",
    "requests": "{requests}",
    "lost": "{lost}",
    "p50 ms": "{p50_ms:.0f}",
    "p99 ms": "{p99_ms:.0f}",
    "longest ms": "{longest_ms:.0f}",
}


def table(results: dict[str, Any]) -> str:
    """A row for each proxy and event."""
    return report.table(_COLUMNS, results.get("rows", []))


def run(chosen: argparse.Namespace) -> bool:
    """Measure and file; False if a request was lost.

    Raises:
        BenchmarkError: a replica or proxy does not run.
        InvalidRequestError: no such proxy.
    """
    for name in chosen.proxies:
        if name not in PROXIES:
            raise InvalidRequestError(f"{name!r} is none of {', '.join(PROXIES)}", param="proxies")
    config = server_configuration(chosen)
    with ExitStack() as stack:
        results = stack.enter_context(report.filed(THEME, config, table, chosen.out))
        measure(chosen, stack.enter_context(fleet(chosen.bundle, chosen.replicas)), results)
    return not results["failures"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.fleet", (__doc__ or "").split("\n")[0])
    parser.set_defaults(device="cpu", threads=1)
    parser.add_argument("--replicas", type=report.positive, default=3)
    parser.add_argument("--clients", type=report.positive, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load before and after each event")
    parser.add_argument("--proxies", type=report.names, default=list(PROXIES))
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
