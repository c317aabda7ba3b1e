"""Many requests, some of them bad or given up: does memory grow?

    tiny or given bundle → server → rounds of requests → resident memory of all its processes after each

Growth is the slope of a straight line through the second half of the rounds, in bytes a request: the
first half fills caches and pools.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.accounts import descendants, resident
from benchmarks.client import Call, drive
from benchmarks.processes import Server, run_with_server

THEME = "soak"
_ROUNDS = 20
# A leak of an image, a job or a future is kilobytes a request; less than this is the allocator's noise.
LEAK = 64.0
_SMOKE = ("--requests", "100")


def calls(count: int, first: int, most: int) -> list[Call]:
    """Requests of one, two and now and then the `most` steps, every tenth of them refused."""
    made = []
    for seed in range(first, first + count):
        body: dict[str, Any] = {"label": seed % 10, "seed": seed, "steps": (1, 1, 1, 1, 2)[seed % 5]}
        if seed % 10 == 9:
            body["label"] = "nothing"
        if seed % 50 == 7:
            body |= {"n": 3, "steps": most}
        group = "bad" if seed % 10 == 9 else ""
        made.append(Call.generate(json.dumps(body), "application/json", group))
    return made


def growth(requests: Sequence[int], memory: Sequence[int]) -> float:
    """Bytes a request over the second half of the rounds, by least squares."""
    half = len(requests) // 2
    return float(np.polyfit(requests[half:], memory[half:], 1)[0])


def measure(chosen: argparse.Namespace, server: Server, results: dict[str, Any]) -> None:
    """Fill `results` with the memory of the server and its device processes after each round."""
    each, most = max(1, chosen.requests // _ROUNDS), server.model()["steps"]["max"]
    results["rounds"] = []
    for number in range(_ROUNDS):
        load = drive(server.port, chosen.clients, calls(each, number * each, most))
        wrong = [o for o in load.outcomes if (o.failure is not None) != (o.group == "bad")]
        if wrong:
            raise report.BenchmarkError(f"{len(wrong)} requests went wrong: {wrong[0].failure}")
        below = sum(resident(pid) for pid in descendants(server.pid))
        results["rounds"].append(
            {"requests": (number + 1) * each, "server": resident(server.pid), "device": below}
        )
    counted = [r["requests"] for r in results["rounds"]]
    for part in ("server", "device"):
        slope = growth(counted, [r[part] for r in results["rounds"]])
        results[f"{part}_bytes_a_request"] = slope
        if slope > LEAK and chosen.requests >= 10_000:
            results["failures"].append(f"the {part}'s memory grows by {slope:.0f} bytes a request")


def table(results: dict[str, Any]) -> str:
    """Memory by requests, and the slopes."""
    rows = [
        [str(r["requests"]), f"{r['server'] / 2**20:.1f}", f"{r['device'] / 2**20:.1f}"]
        for r in results.get("rounds", [])
    ]
    parts = [report.markdown_table(["requests", "server MiB", "device processes MiB"], rows)]
    if "server_bytes_a_request" in results:
        slopes = (results["server_bytes_a_request"], results["device_bytes_a_request"])
        parts.append(
            "Growth over the second half: server {:.1f}, device {:.1f} bytes a request.".format(*slopes)
        )
    return "\n\n".join(parts)


def run(chosen: argparse.Namespace) -> bool:
    """Measure and file; False if memory grows."""
    return run_with_server(THEME, table, measure, chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.soak", (__doc__ or "").split("\n")[0])
    parser.set_defaults(max_batch=32)
    parser.add_argument("--requests", type=report.positive, default=50_000)
    parser.add_argument("--clients", type=report.positive, default=8)
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
