"""A day of a fleet under each way to set its number of pods, simulated with the server's own scheduler.

    measured costs ─┐
    load of a day ──┴▶ pods on a simulated clock ⇄ HPA's rule on a metric ─▶ p99 latency and pod-seconds

The costs are those of a record of `benchmarks.engine`: of 1 and 8 images, between these in proportion.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.autoscaling import SYNC_SECONDS, Autoscaler, Policy, by_pods, by_total
from benchmarks.pods import MODEL, Arrival, FixedCosts, Fleet, Pod, Reply, Sample, latencies
from dd_core.plan import Plan, hybrid, one_step, teacher
from server.scheduling.costs import Work, WorkCosts, buckets_up_to
from server.scheduling.jobs import stages

THEME = "scaling"
# The teacher's passes, of 64 blocks, are simulated four at a time: they take as long as one of a student.
_TOGETHER = 4
_BLOCKS = 64 // _TOGETHER
PLANS = (
    one_step(_BLOCKS),
    replace(hybrid(_BLOCKS, 0, 20 // _TOGETHER), name="pre-trained-1-21"),
    teacher(_BLOCKS),
)
_MEASURED = (1, 8)  # images of a batch
_UTILISATION = 0.7
# Of the day's requests, those that the teacher makes: in its first half and in its second.
_TEACHERS = (0.02, 0.20)
_NIGHT = 0.25  # least load over the most
_SCRAPES = 1 + round(120 / SYNC_SECONDS)  # of two minutes, as KEDA's query has it
_BINS = 60  # of the day, in the plot
_SMOKE = ("--pods", "3", "--each", "1", "--day", "120", "--start", "5")


def cost_table(record: dict[str, Any]) -> FixedCosts:
    """The costs of passes by a record of `benchmarks.engine`.

    Raises:
        BenchmarkError: the record lacks one of the plans.
    """
    results = record["results"]
    try:
        whole = {(row["plan"], row["batch"]): row["median_ms"] / 1e3 for row in results["plans"]}
        parts = {row["batch"]: {k: v / 1e3 for k, v in row["median_ms"].items()} for row in results["stages"]}
        student, rest = Work(MODEL, "student"), Work(MODEL, "decode")
        found = {
            student: {n: parts[n]["plan"] for n in _MEASURED},
            rest: {n: parts[n]["decode"] for n in _MEASURED},
        }
        outside = {n: parts[n]["noise"] + parts[n]["to_uint8"] for n in _MEASURED}
        for plan in PLANS[1:]:
            others = {n: found[rest][n] + outside[n] for n in _MEASURED}
            if "student" in plan.needs:
                others = {n: others[n] + found[student][n] for n in _MEASURED}
            passes = sum(segment.passes for segment in plan.segments if segment.actor == "teacher")
            work = Work(MODEL, "teacher", plan.name)
            found[work] = {n: (whole[plan.name, n] - others[n]) / passes for n in _MEASURED}
    except KeyError as error:
        raise report.BenchmarkError(
            f"the record has no {error}: run benchmarks.engine --batches 1,8"
        ) from error
    few, many = _MEASURED
    table = FixedCosts(buckets_up_to(many))
    table.gap = outside[few]
    for work, seconds in found.items():
        slope = (seconds[many] - seconds[few]) / (many - few)
        between = {bucket: seconds[few] + slope * (bucket - few) for bucket in table.buckets}
        table.restore(work, WorkCosts(between, many))
    return table


def seconds_of(costs: FixedCosts, plan: Plan) -> float:
    """Device time of an image in full batches."""
    full = costs.buckets[-1]
    decode = Work(MODEL, "decode")
    parts = [(stage.work, stage.passes) for stage in stages(MODEL, plan) if stage.work != decode]
    return sum(passes * costs.seconds(work, full) for work, passes in [*parts, (decode, 1)]) / full


@dataclass(frozen=True)
class Day:
    """The load of a day: least at its ends, most in its middle; from then on teachers are asked more."""

    costs: FixedCosts
    pods: int  # that the most of it keeps busy for `_UTILISATION` of their time
    seconds: float

    @property
    def peak(self) -> float:
        """The most requests a second."""
        return self.pods * _UTILISATION / self._mean(self.seconds)

    def load(self, at: float) -> float:
        """Requests a second."""
        return self.peak * (_NIGHT + (1 - _NIGHT) * math.sin(math.pi * at / self.seconds) ** 2)

    def need(self, at: float) -> float:
        """Pods that the load of a time keeps busy for `_UTILISATION` of their time."""
        return self.load(at) * self._mean(at) / _UTILISATION

    def draw(self, at: float, chance: random.Random) -> Arrival:
        """A request of one image."""
        return Arrival(PLANS[2] if chance.random() < self._teachers(at) else PLANS[0], 1)

    def _teachers(self, at: float) -> float:
        return _TEACHERS[at >= self.seconds / 2]

    def _mean(self, at: float) -> float:
        share = self._teachers(at)
        return (1 - share) * seconds_of(self.costs, PLANS[0]) + share * seconds_of(self.costs, PLANS[2])


# What a way to scale proposes: from the number of pods and the metrics of the last minutes, newest last.
Signal = Callable[[int, Sequence[dict[Pod, Sample]], float], list[int]]


def by_gauge(
    name: str, target: float, pods: int, scrapes: Sequence[dict[Pod, Sample]], share: float
) -> list[int]:
    """HPA on a gauge of each pod, as components/hpa has it on `dd_backlog_seconds`."""
    newest = [getattr(sample, name) for sample in scrapes[-1].values()]
    return [by_pods(pods, round(share * pods), statistics.fmean(newest), target)] if newest else [pods]


def keda(target: float, pods: int, scrapes: Sequence[dict[Pod, Sample]], share: float) -> list[int]:
    """KEDA as components/keda has it: the backlog of the last minute, and devices that are busy."""
    newest, minute = scrapes[-1], scrapes[-round(60 / SYNC_SECONDS) :]
    held = [[scrape[pod].backlog for scrape in minute if pod in scrape] for pod in newest]
    before = scrapes[-_SCRAPES] if len(scrapes) >= _SCRAPES else scrapes[0]
    seconds = SYNC_SECONDS * (min(len(scrapes), _SCRAPES) - 1)
    rates = [(newest[pod].busy - before[pod].busy) / seconds for pod in newest if seconds and pod in before]
    scale = share * pods / max(1, len(newest))  # from the pods that are simulated to all
    found = ((sum(map(statistics.fmean, held)), target), (sum(rates), _UTILISATION))
    return [by_total(pods, scale * total, wanted) for total, wanted in found]


@dataclass(frozen=True)
class Way:
    """A way to set the number of pods: `signal`, or none at all."""

    name: str
    pods: int  # at the start
    signal: Signal | None = None


def ways(day: Day) -> list[Way]:
    """The ways that are compared. Where images are counted, they are half a second of one step, or of
    teachers.
    """
    first = max(2, math.ceil(day.need(0.0)))
    steps, teachers = (round(0.5 / seconds_of(day.costs, plan)) for plan in (PLANS[0], PLANS[2]))
    return [
        Way("as many as the peak needs", day.pods),
        Way(f"HPA, {steps} waiting images", first, partial(by_gauge, "waiting", steps)),
        Way(f"HPA, {teachers} waiting images", first, partial(by_gauge, "waiting", teachers)),
        Way("HPA, backlog of 0.5 s", first, partial(by_gauge, "backlog", 0.5)),
        Way("KEDA, backlog of 0.5 s and 70 % busy", first, partial(keda, 0.5)),
    ]


def simulate(day: Day, start: float, each: float, seed: int, way: Way) -> dict[str, Any]:
    """Let a day pass; a row of the results."""
    fleet = Fleet(day.costs, day.load, day.draw, day.peak, start, each, seed)
    fleet.resize(way.pods, started=True)
    sizes = [(0.0, way.pods)]
    # As the manifests have it.
    scaler = Autoscaler(way.pods, 2, 10**6, Policy(100, 0, 30), Policy(10, 1, 60), 300)
    scrapes: list[dict[Pod, Sample]] = []
    for turn in range(1, math.ceil(day.seconds / SYNC_SECONDS) + 1):
        fleet.run(min(day.seconds, turn * SYNC_SECONDS))
        if way.signal is None:
            continue
        scrapes = [*scrapes[1 - _SCRAPES :], fleet.samples()]
        share = len(scrapes[-1]) / len(fleet.pods)
        size = scaler.sync(fleet.now, way.signal(fleet.size, scrapes, share))
        if size != fleet.size:
            fleet.resize(size)
            sizes.append((fleet.now, size))
    fleet.drain()
    replies = fleet.replies
    row: dict[str, Any] = {
        "way": way.name,
        "pod_seconds": fleet.pod_seconds,
        "requests": len(replies),
        "refused": sum(reply.latency is None for reply in replies),
        "sizes": sizes,
    }
    bins: list[list[Reply]] = [[] for _ in range(_BINS)]
    for reply in replies:
        bins[min(_BINS - 1, int(_BINS * reply.at / day.seconds))].append(reply)
    for name, plan in (("one_step", PLANS[0].name), ("teacher", PLANS[2].name)):
        for percent in (50, 99):
            row[f"{name}_p{percent}_ms"] = _milliseconds(replies, plan, percent)
        row[f"{name}_p99_ms_of_the_day"] = [_milliseconds(part, plan, 99) for part in bins]
    return row


def _milliseconds(replies: Sequence[Reply], plan: str, percent: float) -> float | None:
    found = latencies(replies, plan)
    return 1e3 * report.percentile(found, percent) if found else None


def _request(plan: Plan, _at: float, _chance: random.Random) -> Arrival:
    return Arrival(plan, 1)


def capacity(costs: FixedCosts, rate: float, seconds: float) -> list[dict[str, Any]]:
    """Rows of how fleets of fixed size hold `rate` images a second: from the first that can, each plan."""
    rows = []
    for plan in PLANS:
        least = math.floor(rate * seconds_of(costs, plan)) + 1
        for pods in range(least, least + 3):
            fleet = Fleet(costs, lambda _: rate, partial(_request, plan), rate, 0.0)
            fleet.resize(pods, started=True)
            fleet.run(seconds)
            fleet.drain()
            found = latencies(fleet.replies)
            rows.append(
                {
                    "plan": plan.name,
                    "pods": pods,
                    "busy_percent": 100 * sum(pod.busy for pod in fleet.pods) / pods / fleet.now,
                    "refused_percent": 100 * (1 - len(found) / max(1, len(fleet.replies))),
                    "p50_ms": _milliseconds(fleet.replies, plan.name, 50),
                    "p99_ms": _milliseconds(fleet.replies, plan.name, 99),
                }
            )
    return rows


_DAY = {
    "pods": "{way}",
    "mean": "{mean:.0f}",
    "most": "{most}",
    "pod-seconds ÷ the first's": "{share:.2f}",
    "one step: p50 ms": "{one_step_p50_ms:.0f}",
    "p99 ms": "{one_step_p99_ms:.0f}",
    "teacher: p50 ms": "{teacher_p50_ms:.0f}",
    "p99 ms ": "{teacher_p99_ms:.0f}",
    "refused": "{refused_percent:.2f} %",
}
_CAPACITY = {
    "plan": "{plan}",
    "pods": "{pods}",
    "busy": "{busy_percent:.0f} %",
    "p50 ms": "{p50_ms:.0f}",
    "p99 ms": "{p99_ms:.0f}",
    "refused": "{refused_percent:.1f} %",
}


def table(results: dict[str, Any]) -> str:
    """The day by each way, and how many pods a constant load needs."""
    rows = results.get("day", [])
    day = [
        row
        | {
            "mean": row["pod_seconds"] / results["seconds"],
            "most": max(size for _, size in row["sizes"]),
            "share": row["pod_seconds"] / rows[0]["pod_seconds"],
            "refused_percent": 100 * row["refused"] / row["requests"],
        }
        for row in rows
    ]
    parts = [report.table(_DAY, day)]
    if found := results.get("capacity"):
        parts.append(f"Pods for {results['rate']:g} images a second, each of one request:")
        parts.append(report.table(_CAPACITY, found))
    return "\n\n".join(parts)


def plot(day: Day, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the load, and of each way the pods and the p99 latencies, over the day."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 10), layout="constrained")
    load, pods, *late = figure.subplots(4, sharex=True)
    hours = [24 * (n + 0.5) / _BINS for n in range(_BINS)]
    times = [hour / 24 * day.seconds for hour in hours]
    load.plot(hours, [day.load(at) for at in times], color="black")
    load.set(ylabel="requests/s", ylim=(0, None))
    pods.plot(hours, [day.need(at) for at in times], color="black", linestyle=":", label="needed")
    for row in rows:
        changes, sizes = zip(*row["sizes"], (day.seconds, row["sizes"][-1][1]), strict=True)
        [line] = pods.step([24 * at / day.seconds for at in changes], sizes, where="post", label=row["way"])
        for axis, name in zip(late, ("one_step", "teacher"), strict=True):
            values = [math.nan if ms is None else ms / 1e3 for ms in row[f"{name}_p99_ms_of_the_day"]]
            axis.plot(hours, values, color=line.get_color())
    pods.set(ylabel="pods", ylim=(0, None))
    figure.legend(*pods.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize="small")
    for axis, name in zip(late, ("one step", "teachers"), strict=True):
        axis.set(ylabel=f"p99 of {name}, s", yscale="log")
    late[-1].set(xlabel="hour of the day", xlim=(0, 24))
    figure.savefig(path, dpi=100)


def run(chosen: argparse.Namespace) -> bool:
    """Simulate, file and plot.

    Raises:
        BenchmarkError: the record of costs cannot be used.
    """
    chosen.record = chosen.record or newest_record()
    try:
        record = json.loads(chosen.record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise report.BenchmarkError(f"{chosen.record} is no record: {error}") from error
    costs = cost_table(record)
    config = report.configuration(
        torch.device("cpu"), 1, record["configuration"]["bundle"], report.own_options(chosen)
    )
    with report.filed(THEME, config, table, chosen.out) as results:
        day = Day(costs, chosen.pods, chosen.day)
        results |= {"costs_of": record["configuration"], "seconds": day.seconds, "rate": chosen.rate}
        work = partial(simulate, day, chosen.start, chosen.each, chosen.seed)
        # Spawned: a fork of a process with PyTorch's threads may stop for good.
        with ProcessPoolExecutor(chosen.processes, get_context("spawn")) as pool:
            results["day"] = list(pool.map(work, ways(day)))
        results["capacity"] = capacity(costs, chosen.rate, 60.0)
        if chosen.plot is not None:
            plot(day, results["day"], chosen.plot)
    return True


def newest_record() -> Path:
    """The newest record of the engine that has the costs; others are of other models or several arithmetics.

    Raises:
        BenchmarkError: there is none.
    """
    found = []
    for path in (report.RESULTS / "engine").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        with suppress(report.BenchmarkError):
            cost_table(record)
            found.append((record["configuration"]["date"], path))
    if not found:
        raise report.BenchmarkError("no record has the costs: run benchmarks.engine --batches 1,8")
    return max(found)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.scaling", (__doc__ or "").split("\n")[0], bundle=False)
    parser.add_argument("--record", type=Path, help="of benchmarks.engine; left out: the newest")
    parser.add_argument("--pods", type=report.positive, default=2000, help="that the peak needs")
    parser.add_argument("--each", type=report.positive, default=400, help="pods for which one is simulated")
    parser.add_argument("--day", type=float, default=3600.0, help="seconds of the day, which is a short one")
    parser.add_argument("--start", type=float, default=30.0, help="seconds until a new pod is ready")
    parser.add_argument("--rate", type=float, default=100.0, help="images a second to plan for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=report.positive, help="left out: one a core")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
