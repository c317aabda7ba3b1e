"""Processor time that a request costs beyond the model's own, and where it goes.

    server's process:  all its processor time ÷ requests (HTTP, scheduling, encoding; it runs no model)
    device process:    messages of a pass, measured with a pass that computes nothing

The sum is what a request costs whatever the model is. `--profile` says which functions it goes to.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import pstats
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.accounts import cpu_seconds
from benchmarks.client import HOST, Call, drive
from benchmarks.processes import Server, run_with_server
from dd_core import plan
from dd_core.noise import NoiseKey
from server.app import create_app
from server.devices import process as device_process
from server.devices.messages import DeviceOptions, Done, Forward, NewImage
from server.devices.process import Device
from server.launcher import bind, make_server
from server.models.catalog import find
from server.settings import load_settings
from server.state import Phase

THEME = "overhead"
TARGET_MS = 0.5
_SMOKE = ("--requests", "20", "--concurrency", "1,2", "--messages", "20")


class _Instant(Device):
    """A device whose passes take no time: what is left is the message."""

    def forward(self, command: Forward) -> Done:
        picture = np.zeros((32, 32, 3), np.uint8)
        return Done(0.0, 0.0, dict.fromkeys(command.finishing, picture))


def message_ms(images: int, messages: int) -> float:
    """Processor time of the device process for one pass that computes nothing."""
    ours, theirs = multiprocessing.Pipe()
    spent = []

    def serve() -> None:
        try:
            device_process.serve(theirs, _Instant(torch.device("cpu"), DeviceOptions("cpu")))
        except EOFError:
            spent.append(time.thread_time())

    thread = threading.Thread(target=serve)
    thread.start()
    one = plan.one_step(64)
    for number in range(messages):
        numbers = tuple(range(images * number, images * (number + 1)))
        new = tuple(NewImage(n, one, 0, NoiseKey(n, 0)) for n in numbers)
        ours.send(Forward("cifar10", "student", numbers, (0,) * images, images, new, None, numbers))
        ours.recv()
    ours.close()
    thread.join()
    return 1e3 * spent[0] / messages


def measure(chosen: argparse.Namespace, server: Server, results: dict[str, Any]) -> None:
    """Fill `results`: a level for each concurrency, the message's cost, the profile."""
    bodies = ({"label": seed % 10, "seed": seed} for seed in range(chosen.requests))
    calls = [Call.generate(json.dumps(body)) for body in bodies]
    results["message_ms"] = {str(n): message_ms(n, chosen.messages) for n in (1, 8)}
    results["levels"] = []
    for clients in chosen.concurrency:
        images, batches = server.batches()
        before = cpu_seconds(server.pid)
        load = drive(server.port, clients, calls, calls[: 2 * clients])
        spent = cpu_seconds(server.pid) - before
        failed = sum(o.failure is not None for o in load.outcomes)
        if failed:
            raise report.BenchmarkError(f"{failed} requests failed: {load.outcomes[0].failure}")
        sent = len(calls) + 2 * clients
        after = server.batches(images + sent)
        mean = (after[0] - images) / (after[1] - batches)
        level = {
            "clients": clients,
            "server_ms": 1e3 * spent / sent,
            "images_a_batch": mean,
            "message_ms": results["message_ms"]["1"] / mean,
        }
        level["total_ms"] = level["server_ms"] + level["message_ms"]
        results["levels"].append(level)
    if chosen.profile:
        results["profile"] = _profile(chosen, calls)


def _profile(chosen: argparse.Namespace, calls: Sequence[Call]) -> list[dict[str, Any]]:
    """A profile of the server's event loop: the dearest functions by their own time."""
    bound = bind(HOST, 0)
    settings = load_settings(device=chosen.device, max_batch=chosen.max_batch, threads=chosen.threads or 0)
    server = make_server(create_app(settings, [find(chosen.bundle)]), settings, bound)
    profiler = cProfile.Profile()
    thread = threading.Thread(target=profiler.runcall, args=(server.run,), kwargs={"sockets": [bound]})
    thread.start()
    try:
        while server.state.phase in (Phase.LOADING, Phase.WARMING_UP):
            time.sleep(0.05)
        drive(bound.getsockname()[1], 4, calls)
    finally:
        server.should_exit = True
        thread.join()
    rows = []
    for (path, line, name), (_, count, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        where = f"{'/'.join(Path(path).parts[-2:])}:{line}" if line else "built in"
        if "epoll" not in name and count >= len(calls) // 2:
            rows.append({"function": f"{name} ({where})", "us": 1e6 * own / len(calls)})
    return sorted(rows, key=lambda row: -row["us"])[:20]


_LEVELS = {
    "clients": "{clients}",
    "images a batch": "{images_a_batch:.1f}",
    "server ms": "{server_ms:.3f}",
    "device's messages ms": "{message_ms:.3f}",
    "total ms": "{total_ms:.3f}",
    f"< {TARGET_MS} ms": "{reached}",
}
_FUNCTIONS = {"function": "{function}", "own µs a request": "{us:.1f}"}


def table(results: dict[str, Any]) -> str:
    """A row a concurrency; the profile below."""
    levels = [
        {**level, "reached": "yes" if level["total_ms"] < TARGET_MS else "no"}
        for level in results.get("levels", [])
    ]
    parts = ["Processor time a request, beyond the model's own:", report.table(_LEVELS, levels)]
    if results.get("profile"):
        parts += [
            "Where the event loop's time goes (a profiler makes all of it dearer: read the shares):",
            report.table(_FUNCTIONS, results["profile"]),
        ]
    return "\n\n".join(parts)


def run(chosen: argparse.Namespace) -> bool:
    """Measure and file; the aim is judged in the table, not in the exit code."""
    return run_with_server(THEME, table, measure, chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.overhead", (__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=report.positive, default=1000)
    parser.add_argument("--concurrency", type=report.whole_numbers, default=[1, 8])
    parser.add_argument("--messages", type=report.positive, default=2000)
    parser.add_argument("--max-batch", type=report.positive, default=32)
    parser.add_argument("--profile", action="store_true", help="run once more under a profiler")
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
