"""Latency of 1-step requests that come between full-teacher requests.

    for each policy, on a server of its own:
        one teacher request with nothing beside it             → time of one pass
        1-step requests now and then, alone                    → idle p50, p99
        1-step requests now and then, beside the teacher's     → p50, p99  →  ÷ idle

The teacher's requests come from a closed loop, so that the device always has a pass to do: no rate
could disturb more. `fair` is the server's scheduler; `fifo` (first come, first served) is the baseline, the
same server with the queue of `benchmarks.fifo_server`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import open_loop, report
from benchmarks.client import HOST
from benchmarks.open_loop import Arrival, OpenRun, RequestClass, bodies, run_open_loop, schedule
from benchmarks.processes import Server, server_configuration, serving_of

THEME = "interference"
POLICIES = {"fair": "server", "fifo": "benchmarks.fifo_server"}  # the module that is run
# The aim: p99 beside the teacher is at most so many times the idle p99, and one pass.
TIMES_IDLE = 3.0
_BODIES = 100  # that the background repeats
_SMOKE = ("--rate", "20", "--seconds", "1", "--background", "2", "--repeats", "1")


def pass_ms(server: Server, steps: int, images: int, repeats: int) -> float:
    """Median time of one teacher pass over a batch of `images`, with nothing beside it.

    From one request for all of them: its time on the device by its passes, decoding included.
    """
    found = []
    for seed in range(repeats):
        body = {"label": 0, "steps": steps, "n": images, "seed": seed, "brownout": False}
        reply = server.generate(body).json()
        found.append(reply["timings"]["compute_ms"] / reply["steps"])
    return report.median(found)


def policy_row(
    policy: str, one_pass_ms: float, kind: RequestClass, seconds: float, idle: OpenRun, beside: OpenRun
) -> dict[str, Any]:
    """A policy's row, from its own numbers alone. Ratios are None where nothing was answered.

    Args:
        kind: the 1-step requests, class 0 of both runs.
        seconds: that each run lasted.
    """
    (alone,), (loaded,) = (open_loop.summarise([kind], run.records, (0.0, seconds)) for run in (idle, beside))
    # Only what came while the 1-step requests did.
    teacher = [record for record in beside.background if record.done is not None and record.done >= 0]
    before, after = alone["latency_ms"], loaded["latency_ms"]
    ratios = dict.fromkeys(("p50_over_idle", "p99_over_idle", "aim_ms", "p99_over_aim"))
    if before and after:
        ratios |= {f"{p}_over_idle": after[p] / before[p] for p in ("p50", "p99")}
        aim = ratios["aim_ms"] = TIMES_IDLE * before["p99"] + one_pass_ms
        ratios["p99_over_aim"] = after["p99"] / aim
    return {
        "policy": policy,
        "pass_ms": one_pass_ms,
        "idle": alone,
        "beside": loaded,
        **ratios,
        "teacher_outcomes": dict(Counter(record.outcome for record in teacher)),
        "teacher_per_s": sum(record.good for record in teacher) / beside.seconds,
        "sender": open_loop.sender_facts(beside),
    }


def failures(row: Mapping[str, Any]) -> list[str]:
    """Reasons why a row is no measurement: requests that failed, or a background that did not disturb."""
    loads = {
        "idle": row["idle"]["outcomes"],
        "beside the teacher": row["beside"]["outcomes"],
        "teacher": row["teacher_outcomes"],
    }
    found = []
    for phase, outcomes in loads.items():
        found += report.unexpected(f"{row['policy']}, {phase}", outcomes, {"200"})
    if not row["teacher_outcomes"]:
        found.append(f"{row['policy']}: no teacher request was answered meanwhile")
    return found


_EXPLANATION = (
    "1-step requests at a low rate (Poisson), alone and beside a closed loop of full-teacher requests. "
    "Latencies count from the scheduled arrival. The aim for p99 with the policy `fair` is "
    f"{TIMES_IDLE:.0f} times its idle value and one teacher pass, over a batch of as many images as the "
    "closed loop has clients."
)
_COLUMNS = {
    "policy": "{policy}",
    "idle p50 ms": "{idle[latency_ms][p50]:.1f}",
    "idle p99 ms": "{idle[latency_ms][p99]:.1f}",
    "p50 ms": "{beside[latency_ms][p50]:.1f}",
    "p99 ms": "{beside[latency_ms][p99]:.1f}",
    "p50 ÷ idle": "{p50_over_idle:.2f}",
    "p99 ÷ idle": "{p99_over_idle:.2f}",
    "one pass ms": "{pass_ms:.1f}",
    "aim ms": "{aim_ms:.1f}",
    "p99 ÷ aim": "{p99_over_aim:.2f}",
    "teacher requests/s": "{teacher_per_s:.2f}",
}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = results.get("policies", [])
    senders = [
        f"`{row['policy']}`: {row['beside']['requests']} requests. {open_loop.sender_line(row['sender'])}"
        for row in rows
    ]
    return "\n\n".join([_EXPLANATION, report.table(_COLUMNS, rows), *senders])


def run(arguments: argparse.Namespace) -> bool:
    """Measure and file; False if a request failed.

    Raises:
        DDError: no such bundle or device, or a process ended.
    """
    config = server_configuration(arguments)
    with report.filed(THEME, config, table, arguments.out) as results:
        rows = results.setdefault("policies", [])
        for policy in arguments.policies:
            print(f"policy {policy}", flush=True)
            with serving_of(arguments, POLICIES[policy]) as server:
                rows.append(_measure(arguments, policy, server))
            results["failures"].extend(failures(rows[-1]))
    return not results["failures"]


def _measure(arguments: argparse.Namespace, policy: str, server: Server) -> dict[str, Any]:
    model = server.model()
    labels, least, most = len(model["classes"]), model["steps"]["min"], model["steps"]["max"]
    one = RequestClass("one step", arguments.rate, {"steps": least})
    teacher = RequestClass("teacher", 1.0, {"steps": most, "brownout": False})
    classes, address = (one, teacher), (HOST, server.port)
    one_pass = pass_ms(server, most, min(arguments.background, model["limits"]["n"]), arguments.repeats)
    arrivals = schedule([one], arguments.seconds, arguments.seed, labels)
    idle = run_open_loop(address, classes, arrivals)
    repeated = [Arrival(0.0, 1, text) for text in bodies(teacher, _BODIES, labels)]
    lead = 1.0 + 2e-3 * most * one_pass  # until the background's batches have settled
    beside = run_open_loop(address, classes, arrivals, (arguments.background, repeated), lead)
    return policy_row(policy, one_pass, one, arguments.seconds, idle, beside)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.interference", "1-step requests beside full-teacher requests.")
    parser.add_argument("--rate", type=float, default=5.0, help="1-step requests a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--background", type=report.positive, default=4, help="clients of the closed loop")
    parser.add_argument("--repeats", type=report.positive, default=3, help="of the pass that is timed")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--max-batch", type=report.positive, default=32, help="of the server")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals' times")
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
