"""The server under load, against the raw loop on the same machine in the same run.

    rounds × loads (one step, two steps, mixed) × concurrencies:
        raw loop, then closed-loop clients on the real server  →  served ÷ raw

Both are processes of their own and never compute at the same time: the raw loop waits while the
server works, and the server is idle while the raw loop does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from benchmarks import report
from benchmarks.client import KINDS, Call, Load, drive
from benchmarks.processes import RawLoop, Server, check_steps, run_with_server, started
from distilled_decoding.contract import ImageFormat
from server.settings import Determinism

THEME = "http-load"
# Shares of the budgets in the mixed load: the cheapest plan, the next one, the one after.
MIX = (7, 2, 1)
_SMOKE = ("--concurrency", "1,2", "--requests", "10", "--rounds", "1")


@dataclass(frozen=True)
class Traffic:
    """A load: budgets and how often each comes, with the plans that the server picks for them."""

    name: str
    shares: dict[int, int]  # step budget → share
    plans: dict[int, str]  # step budget → plan

    def budgets(self, requests: int) -> list[int]:
        """The budget of each of `requests` requests: shuffled, the same in every run."""
        pattern = [steps for steps, share in self.shares.items() for _ in range(share)]
        order = random.Random(0)
        drawn: list[int] = []
        while len(drawn) < requests:
            drawn += order.sample(pattern, len(pattern))
        return drawn[:requests]


@dataclass
class Level:
    """Measurements of one traffic at one concurrency; one entry a round in each list."""

    traffic: Traffic
    clients: int
    raw_batch: int
    loads: list[Load] = field(default_factory=list)
    # Seconds that the raw loop takes for as many images of the same plans as the load had.
    raw_seconds: list[float] = field(default_factory=list)
    images: float = 0.0  # that the server computed
    batches: float = 0.0  # in so many batches


def traffics(model: Mapping[str, Any], steps: Sequence[int]) -> list[Traffic]:
    """One traffic for each budget in `steps`, and the mixed one.

    Args:
        model: the entry of `GET /models`.

    Raises:
        InvalidRequestError: a budget that the model has no plan for.
    """

    def plan(budget: int) -> str:
        check_steps(model, budget)
        return next(str(run["plan"]) for run in model["budgets"] if run["from"] <= budget <= run["to"])

    found = [Traffic(f"steps {budget}", {budget: 1}, {budget: plan(budget)}) for budget in steps]
    cheapest = [run["from"] for run in model["budgets"]][: len(MIX)]
    mixed = dict(zip(cheapest, MIX, strict=False))
    return [*found, Traffic("mixed", mixed, {budget: plan(budget) for budget in mixed})]


def calls(traffic: Traffic, requests: int, classes: int, first_seed: int, form: str = "png") -> list[Call]:
    """JSON in, one file out; every request has a class and a seed of its own."""
    made = []
    for number, budget in enumerate(traffic.budgets(requests)):
        body = {"label": number % classes, "steps": budget, "seed": first_seed + number, "brownout": False}
        made.append(Call.generate(json.dumps(body), f"image/{form}", traffic.plans[budget]))
    return made


def measure(
    level: Level, server: Server, raw: RawLoop, kind: str, wanted: list[Call], warm_up: list[Call]
) -> None:
    """One round of one level: first the raw loop, then the clients."""
    counts = Counter(call.group for call in wanted)
    level.raw_seconds.append(sum(raw.seconds(plan, level.raw_batch, n) for plan, n in counts.items()))
    images, batches = server.batches()
    load = drive(server.port, level.clients, wanted, warm_up, kind)
    level.loads.append(load)
    answered = sum(outcome.failure is None for outcome in load.outcomes)
    images_after, batches_after = server.batches(images + answered + len(warm_up))
    level.images += images_after - images
    level.batches += batches_after - batches


def summarise(level: Level) -> dict[str, Any]:
    """A level's row, from its own numbers alone. Requests that failed count in no rate and no latency."""
    outcomes = [outcome for load in level.loads for outcome in load.outcomes]
    good = [outcome for outcome in outcomes if outcome.failure is None]
    seconds = sum(load.seconds for load in level.loads)
    cpu = sum(load.cpu_seconds for load in level.loads)
    served = [sum(o.failure is None for o in load.outcomes) / load.seconds for load in level.loads]
    pairs = zip(level.loads, level.raw_seconds, strict=True)
    raw = [len(load.outcomes) / raw_seconds for load, raw_seconds in pairs]
    plans = sorted(set(level.traffic.plans.values()))
    by_plan = {plan: report.milliseconds([o.seconds for o in good if o.plan == plan]) for plan in plans}
    rates = {
        "requests_per_s": len(good) / seconds,
        "latency_ms": report.milliseconds([outcome.seconds for outcome in good]),
        "raw_images_per_s": report.median(raw),
        "served_over_raw": report.paired_ratio(served, raw),
        "client_cpu_ms_per_request": 1e3 * cpu / len(outcomes),
        "client_cpu_share": cpu / seconds,
    }
    return {
        "load": level.traffic.name,
        "plans": plans,
        "concurrency": level.clients,
        "requests": len(outcomes),
        "failed": dict(Counter(o.failure for o in outcomes if o.failure is not None)),
        "latency_ms_by_plan": {plan: latencies for plan, latencies in by_plan.items() if latencies},
        "raw_batch": level.raw_batch,
        "rounds": [{"served_per_s": a, "raw_per_s": b} for a, b in zip(served, raw, strict=True)],
        "mean_batch": level.images / level.batches if level.batches else None,
        **(rates if good else dict.fromkeys(rates)),
    }


def client_costs(server: Server, clients: Sequence[int], requests: int) -> list[dict[str, Any]]:
    """Both clients on `GET /healthz`, where the server has next to nothing to do.

    What this reaches is the most that client and HTTP layer allow; a load that comes near it
    measures them rather than the engine.
    """
    call = Call("GET", "/healthz", starts_with=b'{"status":"ok"}')
    rows = []
    for number in clients:
        for kind in KINDS:
            load = drive(server.port, number, [call] * requests, [call] * number, kind)
            failed = sum(outcome.failure is not None for outcome in load.outcomes)
            rows.append(
                {
                    "client": kind,
                    "concurrency": number,
                    "requests": requests,
                    "failed": failed,
                    "requests_per_s": (requests - failed) / load.seconds,
                    "client_cpu_ms_per_request": 1e3 * load.cpu_seconds / requests,
                }
            )
    return rows


_EXPLANATION = (
    "JSON in, one picture out. The raw loop makes the same files in as many processes as the server has on "
    "its devices, as many at a time as there are clients, encoding included. The client's CPU is the share "
    "of one core that it took."
)
_LATENCIES = {f"{p} ms": f"{{latency_ms[{p}]:.1f}}" for p in ("p50", "p95", "p99")}
_LOADS = {
    "load": "{load}",
    "clients": "{concurrency}",
    "requests/s": "{requests_per_s:.1f}",
    **_LATENCIES,
    "images a batch": "{mean_batch:.1f}",
    "raw loop images/s": "{raw_images_per_s:.1f}",
    "served ÷ raw": "{served_over_raw:.2f}",
    "client's CPU": "{client_cpu_share:.0%}",
    "failed": "{all_failed}",
}
_PLANS = {"load": "{load}", "clients": "{concurrency}", "plan": "{plan}", **_LATENCIES}
_COSTS = {
    "client": "{client}",
    "clients": "{concurrency}",
    "requests/s": "{requests_per_s:.0f}",
    "client's CPU ms a request": "{client_cpu_ms_per_request:.3f}",
}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    loads = [{**row, "all_failed": sum(row["failed"].values())} for row in results.get("loads", [])]
    plans = [
        {**row, "plan": plan, "latency_ms": latency}
        for row in loads
        if len(row["plans"]) > 1
        for plan, latency in row["latency_ms_by_plan"].items()
    ]
    parts = [
        _EXPLANATION,
        report.table(_LOADS, loads),
        "The mixed load by plan:",
        report.table(_PLANS, plans),
        "The clients themselves, on `GET /healthz`:",
        report.table(_COSTS, results.get("client_costs", [])),
    ]
    return "\n\n".join(parts)


def _measure_all(arguments: argparse.Namespace, server: Server, results: dict[str, Any]) -> None:
    model = server.model()
    with RawLoop(arguments.bundle, started(arguments), arguments.format, arguments.determinism) as raw:
        if model["weights"] != raw.digest:
            raise report.BenchmarkError("the server and the raw loop serve different weights")
        *plain, mixed = traffics(model, arguments.steps)
        most = max(arguments.concurrency)
        pairs = [*itertools.product(plain, arguments.concurrency), (mixed, most)]
        levels = [Level(traffic, clients, min(clients, arguments.max_batch)) for traffic, clients in pairs]
        results["client_costs"] = client_costs(server, sorted({1, most}), arguments.requests)
        seed = 0
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}: {len(levels)} loads", flush=True)
            for level in levels:
                wanted, warm_up = (
                    calls(level.traffic, count, len(model["classes"]), seed + skipped, arguments.format)
                    for count, skipped in ((arguments.requests, 0), (level.clients, arguments.requests))
                )
                measure(level, server, raw, arguments.client, wanted, warm_up)
                seed += arguments.requests + level.clients
                results["loads"] = [summarise(done) for done in levels if done.loads]
    for row in results["loads"]:
        who = f"{row['load']}, {row['concurrency']} clients"
        results["failures"] += report.unexpected(who, row["failed"])


def run(arguments: argparse.Namespace) -> bool:
    """Measure and file; False if a request failed."""
    return run_with_server(THEME, table, _measure_all, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.http_load", "The server under load, against the raw loop.")
    parser.add_argument(
        "--concurrency", type=report.whole_numbers, default=[1, 2, 4, 8, 16], help="clients, such as 1,4,16"
    )
    parser.add_argument("--requests", type=report.positive, default=100, help="of every load in every round")
    parser.add_argument("--rounds", type=report.positive, default=3)
    parser.add_argument(
        "--steps", type=report.whole_numbers, default=[1, 2], help="step budgets, such as 1,2"
    )
    parser.add_argument("--max-batch", type=report.positive, default=32, help="of the server")
    parser.add_argument("--format", choices=get_args(ImageFormat), default="png", help="of the files")
    parser.add_argument("--determinism", choices=get_args(Determinism), default="exact", help="of the server")
    parser.add_argument("--client", choices=list(KINDS), default="lean")
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
