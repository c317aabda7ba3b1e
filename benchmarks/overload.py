"""Three times what the server can do, for as long as it takes to matter.

    rounds:  for each lane: closed loop at saturation, open loop at FACTOR × what it reached, closed loop
             → goodput ÷ mean of both closed loops

A server that is asked too much can still do all that it can do, if it spends its time only on what will
be in time. The lane `told` sends each request's deadline along. Its baseline, `untold`, is the same
load judged by the same deadline, of which the server knows nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import open_loop, report
from benchmarks.client import HOST, Call, Load, drive
from benchmarks.open_loop import REFUSALS, OpenRun, RequestClass, bodies, run_open_loop, schedule
from benchmarks.processes import Server, check_steps, run_with_server
from dd_core.runtime import pick_device

THEME, BELOW = "overload", "open-loop"  # the second below capacity, where nothing has to be refused
LANES = ("told", "untold")
_AIM = 0.9  # of goodput ÷ capacity
_EXPECTED = {"200", "504", *map(str, REFUSALS)}
_SMOKE = ("--clients", "4", "--requests", "20", "--seconds", "1", "--rounds", "1")


def _capacity(chosen: argparse.Namespace, server: Server, labels: int) -> dict[str, Any]:
    """The row of a closed loop with so many clients that the device never waits."""
    kind = RequestClass("capacity", 1.0, {"steps": chosen.steps, "brownout": False})
    texts = bodies(kind, chosen.requests + chosen.clients, labels)
    calls = [Call.generate(text, group="capacity") for text in texts]
    return capacity_row(drive(server.port, chosen.clients, calls[chosen.clients :], calls[: chosen.clients]))


def capacity_row(load: Load) -> dict[str, Any]:
    """Good replies a second, and how long each took.

    Raises:
        BenchmarkError: a request failed: what the server can do is then unknown.
    """
    failures = {outcome.failure for outcome in load.outcomes if outcome.failure is not None}
    if failures:
        raise report.BenchmarkError(f"the closed loop had failures: {', '.join(sorted(failures))}")
    seconds = [outcome.seconds for outcome in load.outcomes]
    return {"per_s": len(seconds) / load.seconds, "latency_ms": report.milliseconds(seconds)}


def bracket(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The capacity of the time between two measurements of it."""
    mean = (before["per_s"] + after["per_s"]) / 2
    return {**before, "per_s": mean, "before_per_s": before["per_s"], "after_per_s": after["per_s"]}


def request_class(lane: str, rate: float, steps: int, deadline_ms: float) -> RequestClass:
    """The requests of a lane."""
    body: dict[str, Any] = {"steps": steps, "brownout": False}
    if lane == "told":
        body["deadline_ms"] = deadline_ms
    return RequestClass(lane, rate, body, deadline_ms)


def lane_row(
    number: int, kind: RequestClass, run: OpenRun, window: tuple[float, float], capacity: Mapping[str, Any]
) -> dict[str, Any]:
    """The row of a lane in one round, against the capacity just before and just after it."""
    (row,) = open_loop.summarise([kind], run.records, window)
    return row | {
        "round": number,
        "capacity": dict(capacity),
        "deadline_ms": kind.deadline_ms,
        "goodput_over_capacity": row["goodput_per_s"] / capacity["per_s"],
        "sender": open_loop.sender_facts(run),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each lane the medians over its rounds."""
    found = []
    for lane in dict.fromkeys(row["class"] for row in rows):
        mine = [row for row in rows if row["class"] == lane]
        kept = [row["kept"] for row in mine if row["kept"] is not None]
        refusals = [row["refusal_ms"] for row in mine if row["refusal_ms"]]
        middle = {p: report.median([row[p] for row in refusals]) for p in ("p50", "p99") if refusals}
        ratio = report.median([row["goodput_over_capacity"] for row in mine])
        found.append(
            {
                "lane": lane,
                "goodput_over_capacity": ratio,
                "kept": report.median(kept) if kept else None,
                "refusal_ms": middle or None,
            }
        )
    return found


_EXPLANATION = (
    "Capacity is what a closed loop reaches at saturation: the mean of right before and right after, since a "
    "machine's speed drifts. *Kept* is the share of the requests "
    "not refused at once (429, 503) whose image came within the deadline. Every time counts from the "
    f"scheduled arrival. The aim for goodput ÷ capacity with the deadline told is {_AIM}."
)
_COLUMNS = {
    "deadline": "{lane}",
    "goodput ÷ capacity": "{goodput_over_capacity:.2f}",
    "kept": "{kept:.1%}",
    "refusal p50 ms": "{refusal_ms[p50]:.1f}",
    "refusal p99 ms": "{refusal_ms[p99]:.1f}",
}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts = [_EXPLANATION, report.table(_COLUMNS, results.get("summary", []))]
    for row in results.get("rows", []):
        about = f"Round {row['round']}, deadline of {row['deadline_ms']:.0f} ms {row['class']}"
        found = row["capacity"]
        between = f"{found['before_per_s']:.1f} before, {found['after_per_s']:.1f} after"
        parts.append(
            f"{about}: capacity {found['per_s']:.1f}/s ({between}). {open_loop.sender_line(row['sender'])}"
        )
        parts.append(open_loop.table([row]))
    return "\n\n".join(parts)


def _measure(arguments: argparse.Namespace, server: Server, results: dict[str, Any]) -> None:
    model = server.model()
    labels, steps = len(model["classes"]), arguments.steps
    check_steps(model, steps)
    deadline, rows = arguments.deadline_ms, results.setdefault("rows", [])
    for number in range(1, arguments.rounds + 1):
        print(f"round {number} of {arguments.rounds}: {len(arguments.lanes)} lanes", flush=True)
        for lane in arguments.lanes:
            before = _capacity(arguments, server, labels)
            deadline = deadline or math.ceil(2 * before["latency_ms"]["p50"])
            kind = request_class(lane, arguments.factor * before["per_s"], steps, deadline)
            # What comes before the queue has filled up is easy, and does not count.
            settle = min(2e-3 * deadline, arguments.seconds)
            window = (settle, settle + arguments.seconds)
            arrivals = schedule([kind], window[1], arguments.seed + number, labels)
            done = run_open_loop((HOST, server.port), [kind], arrivals)
            capacity = bracket(before, _capacity(arguments, server, labels))
            rows.append(lane_row(number, kind, done, window, capacity))
            results["summary"] = summary(rows)
    for row in rows:
        who = f"round {row['round']}, {row['class']}"
        results["failures"] += report.unexpected(who, row["outcomes"], _EXPECTED)


def run(arguments: argparse.Namespace) -> bool:
    """Measure and file; False if a reply failed or never came."""
    if arguments.processes:
        arguments.device = ",".join([str(pick_device(arguments.device))] * arguments.processes)
    return run_with_server(THEME if arguments.factor > 1 else BELOW, table, _measure, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.overload", "The server at several times its capacity.")
    parser.add_argument("--steps", type=report.positive, default=1, help="step budget of every request")
    parser.add_argument("--factor", type=float, default=3.0, help="offered ÷ capacity")
    parser.add_argument("--clients", type=report.positive, default=64, help="of the closed loop")
    parser.add_argument("--requests", type=report.positive, default=500, help="of the closed loop")
    parser.add_argument("--seconds", type=float, default=30.0, help="that are measured of each open loop")
    parser.add_argument("--rounds", type=report.positive, default=2)
    parser.add_argument(
        "--deadline-ms", type=float, help="left out, twice the median latency of the closed loop"
    )
    parser.add_argument("--lanes", nargs="+", choices=LANES, default=list(LANES))
    parser.add_argument(
        "--processes", type=report.positive, help="on the device; left out, as the server chooses"
    )
    parser.add_argument("--max-batch", type=report.positive, default=32, help="of the server")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals' times")
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
