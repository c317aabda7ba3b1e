"""Replicas behind the proxies of deploy/proxy/ under load, while replicas and device processes are killed.

    clients → nginx or HAProxy → replicas   ← kill −9, rolling SIGTERM, kill −9 of a device process

A request is lost if its reply is not 200, or not the image that its seed makes; nobody tries again but the
proxy and the server. Every replica must make the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks import report
from benchmarks.client import HOST
from benchmarks.processes import server_configuration
from benchmarks.replicas import HTTP, MAX_BATCH, PROXIES, Replica, fleet, proxying
from dd_core.errors import InvalidRequestError

THEME = "fleet"
_SMOKE = ("--replicas", "2", "--clients", "2", "--seconds", "1", "--proxies", "nginx")
_SEEDS = 8
_Event = Callable[[Sequence[Replica]], None]


def body(seed: int) -> dict[str, Any]:
    """The request of a seed."""
    return {"label": seed % 10, "seed": seed}


def picture(url: str, seed: int) -> bytes:
    """The image of a seed.

    Raises:
        BenchmarkError: the reply is none.
    """
    try:
        reply = HTTP.post(f"{url}/generate", json=body(seed), headers={"accept": "image/png"})
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


def kill(found: Sequence[Replica]) -> None:
    """One replica is killed, and started again."""
    found[0].restart(signal.SIGKILL)


def roll(found: Sequence[Replica]) -> None:
    """Every replica in turn is asked to end, and started again."""
    for replica in found:
        replica.restart(signal.SIGTERM)


def kill_device(found: Sequence[Replica]) -> None:
    """The device process of one replica is killed; the replica starts another."""
    pid = found[-1].device_process()
    os.kill(pid, signal.SIGKILL)
    found[-1].wait_until_ready()


EVENTS: dict[str, _Event] = {
    "kill -9 of a replica": kill,
    "rolling restart": roll,
    "kill -9 of a device process": kill_device,
}


def measure(chosen: argparse.Namespace, found: Sequence[Replica], results: dict[str, Any]) -> None:
    """Fill `results`: for each proxy and event the requests, those lost, and the latencies."""
    urls = [f"http://{HOST}:{replica.port}" for replica in found]
    expected = [picture(urls[0], seed) for seed in range(_SEEDS)]
    results["rows"] = []
    for url in urls[1:]:
        if [picture(url, seed) for seed in range(_SEEDS)] != expected:
            results["failures"].append("two replicas make other bytes of one seed")
    for proxy in chosen.proxies:
        with proxying(proxy, [replica.port for replica in found]) as url:
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
    chosen.max_batch = MAX_BATCH
    config = server_configuration(chosen)
    with ExitStack() as stack:
        results = stack.enter_context(report.filed(THEME, config, table, chosen.out))
        measure(
            chosen,
            stack.enter_context(fleet(chosen.bundle, chosen.replicas, chosen.device, chosen.threads)),
            results,
        )
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
