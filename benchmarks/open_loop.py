"""An open loop: requests that come at random times, as users' do, however slow the server is.

    classes (rate, body) → schedule (Poisson, seeded) → benchmarks.open_client → records → rows

A closed loop asks less of a server that gets slower, and so hides its worst moments ("coordinated
omission"). Here the times are fixed before the first request is sent, and every latency counts from
the time that was scheduled. As a command it loads a server that already runs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from benchmarks import report
from benchmarks.client import Record
from benchmarks.processes import run_module
from dd_core.errors import InvalidRequestError

# What the server answers at once when it does not take a request. 504 is none of them: a request
# that was taken and then dropped has broken a promise.
REFUSALS = (429, 503)
_BUSY = (*REFUSALS, 504)  # what a server that works may say
_PATIENCE = 60.0  # seconds after the last arrival in which a reply still counts


@dataclass(frozen=True)
class RequestClass:
    """Requests of one kind.

    Args:
        name: what results are told apart by.
        rate: arrivals a second, on average.
        body: of `POST /generate`; every request gets a seed of its own, and a class in turn if there
            is no label.
        deadline_ms: from the scheduled arrival, by which a reply is judged; None = any reply is in
            time. The server is told of it only by a field of `body`.
        accept: media type of the reply.
    """

    name: str
    rate: float
    body: Mapping[str, Any] = field(default_factory=dict)
    deadline_ms: float | None = None
    accept: str = "image/png"


class Arrival(NamedTuple):
    """One request of a schedule: `at` seconds after zero."""

    at: float
    kind: int
    body: str


@dataclass(frozen=True)
class OpenRun:
    """An open loop that has ended.

    Args:
        records: one an arrival, in order of time.
        background: of the closed loop beside it; their `at` is when they were sent.
        seconds: from zero to the last reply.
        cpu_seconds: of the sending process meanwhile.
        connections: that it opened.
    """

    records: list[Record]
    background: list[Record]
    seconds: float
    cpu_seconds: float
    connections: int


def bodies(kind: RequestClass, count: int, labels: int) -> list[str]:
    """So many bodies of a class; the same in every run.

    Args:
        labels: number of classes of the model.
    """
    return [json.dumps({"label": number % labels, "seed": number, **kind.body}) for number in range(count)]


def schedule(classes: Sequence[RequestClass], seconds: float, seed: int, labels: int = 1) -> list[Arrival]:
    """Arrivals of every class within `seconds`, merged in order of time.

    The gaps of a class are exponential and come from a generator of its own, so that another class
    beside it does not move its arrivals.

    Raises:
        InvalidRequestError: a rate that is not above 0.
    """
    found: list[Arrival] = []
    for index, kind in enumerate(classes):
        if not kind.rate > 0:
            raise InvalidRequestError(
                f"the rate of {kind.name!r} must be above 0, not {kind.rate}", param="rate"
            )
        order = random.Random(f"{seed} {kind.name}")
        times, at = list[float](), order.expovariate(kind.rate)
        while at < seconds:
            times.append(at)
            at += order.expovariate(kind.rate)
        texts = bodies(kind, len(times), labels)
        found += [Arrival(at, index, text) for at, text in zip(times, texts, strict=True)]
    return sorted(found, key=lambda arrival: arrival.at)


def run_open_loop(
    address: tuple[str, int],
    classes: Sequence[RequestClass],
    arrivals: Sequence[Arrival],
    background: tuple[int, Sequence[Arrival]] = (0, ()),
    lead: float = 0.2,
) -> OpenRun:
    """Send the schedule from a process of its own.

    Args:
        background: clients of a closed loop beside it, and the requests that they repeat.
        lead: seconds that the closed loop runs before zero.

    Raises:
        BenchmarkError: the process failed.
    """
    order = {
        "host": address[0],
        "port": address[1],
        "accept": [kind.accept for kind in classes],
        "arrivals": arrivals,
        "clients": background[0],
        "background": background[1],
        "lead": lead,
        "patience": _PATIENCE,
    }
    about = "the open loop's sender failed"
    answer = json.loads(run_module("benchmarks.open_client", about=about, given=json.dumps(order)))
    records, background_records = ([Record(*row) for row in answer.pop(k)] for k in ("records", "background"))
    return OpenRun(records, background_records, **answer)


def summarise(
    classes: Sequence[RequestClass], records: Sequence[Record], window: tuple[float, float]
) -> list[dict[str, Any]]:
    """A row for each class, and one for all, of the arrivals within `window` seconds.

    `in_time` are replies that are 200 and within their deadline, `goodput_per_s` is how many of them
    there were a second. `kept` is their share of the requests that were not refused at once.
    """
    inside = [record for record in records if window[0] <= record.at < window[1]]
    rows = [
        _row(kind.name, classes, [record for record in inside if record.kind == index], window)
        for index, kind in enumerate(classes)
    ]
    return rows if len(rows) == 1 else [*rows, _row("all", classes, inside, window)]


def _row(
    name: str, classes: Sequence[RequestClass], records: Sequence[Record], window: tuple[float, float]
) -> dict[str, Any]:
    length = window[1] - window[0]
    deadlines = [math.inf if kind.deadline_ms is None else kind.deadline_ms for kind in classes]
    in_time = sum(record.good and 1e3 * record.seconds <= deadlines[record.kind] for record in records)
    refused = [record for record in records if record.status in REFUSALS and record.done is not None]
    taken = len(records) - len(refused)
    return {
        "class": name,
        "requests": len(records),
        "offered_per_s": len(records) / length,
        "outcomes": dict(sorted(Counter(record.outcome for record in records).items())),
        "latency_ms": report.milliseconds([record.seconds for record in records if record.good]),
        "refusal_ms": report.milliseconds([record.seconds for record in refused]),
        "in_time": in_time,
        "goodput_per_s": in_time / length,
        "kept": in_time / taken if taken else None,
    }


def sender_facts(run: OpenRun) -> dict[str, Any]:
    """Facts of the sender: its cost, and how late it was: its lateness is in every latency."""
    late = [record.sent - record.at for record in run.records if record.sent is not None]
    return {
        "late_ms": report.milliseconds(late),
        "cpu_ms_per_request": 1e3 * run.cpu_seconds / len(run.records) if run.records else None,
        "cpu_share": run.cpu_seconds / run.seconds,
        "connections": run.connections,
    }


_COLUMNS = {
    "class": "{class}",
    "offered/s": "{offered_per_s:.1f}",
    "goodput/s": "{goodput_per_s:.1f}",
    "kept": "{kept:.1%}",
    "p50 ms": "{latency_ms[p50]:.1f}",
    "p95 ms": "{latency_ms[p95]:.1f}",
    "p99 ms": "{latency_ms[p99]:.1f}",
    "refusal p50 ms": "{refusal_ms[p50]:.1f}",
    "refusal p99 ms": "{refusal_ms[p99]:.1f}",
    "outcomes": "{told}",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    told = (", ".join(f"{count} × {outcome}" for outcome, count in row["outcomes"].items()) for row in rows)
    return report.table(_COLUMNS, [{**row, "told": text} for row, text in zip(rows, told, strict=True)])


def sender_line(facts: Mapping[str, Any]) -> str:
    """One sentence on the sender."""
    late = facts["late_ms"] or {}
    return (
        f"The sender was late by {late.get('p50', 0):.1f} ms in the median and {late.get('p99', 0):.1f} ms "
        f"at p99 (which is part of every latency), took {facts['cpu_share']:.0%} of a core and opened "
        f"{facts['connections']} connections."
    )


def request_class(text: str) -> RequestClass:
    """The type of the option `--class`: a JSON object of the fields of `RequestClass`."""
    made = RequestClass(**json.loads(text))
    if not all(isinstance(value, (int, float)) for value in (made.rate, made.deadline_ms or 0.0)):
        raise ValueError(text)
    return made


request_class.__name__ = "JSON object of name, rate, body, deadline_ms and accept"


def went_well(record: Record) -> bool:
    """True for a picture, and for the refusal of a server that is busy."""
    return record.good or (record.done is not None and record.status in _BUSY)


def run(arguments: argparse.Namespace) -> bool:
    """Load a running server and print what became of the requests; False if one had no reply, or one that is
    neither a picture nor a refusal of a busy server.

    Raises:
        InvalidRequestError: no server, or a rate that is not above 0.
    """
    url = urllib.parse.urlsplit(arguments.url)
    if url.scheme != "http" or url.hostname is None:
        raise InvalidRequestError(
            f"url must be like http://127.0.0.1:8000, not {arguments.url!r}", param="url"
        )
    host, port = url.hostname, url.port or 80
    try:
        models = httpx.get(f"http://{url.netloc}/models", timeout=10, trust_env=False).json()
        labels = len(models["models"][0]["classes"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise InvalidRequestError(f"no server answers at {host}:{port} ({error})", param="url") from None
    if not labels:
        raise InvalidRequestError("url must be of a server of a model of classes", param="url")
    classes = arguments.classes or [RequestClass("one step", 10.0, {"steps": 1})]
    arrivals = schedule(classes, arguments.seconds, arguments.seed, labels)
    done = run_open_loop((host, port), classes, arrivals)
    rows, facts = summarise(classes, done.records, (0.0, arguments.seconds)), sender_facts(done)
    if arguments.json:
        print(json.dumps({"classes": rows, "sender": facts}))
    else:
        print(f"{table(rows)}\n\n{sender_line(facts)}")
    return all(went_well(record) for record in done.records)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.open_loop", description="Poisson arrivals at a server that already runs."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals' times")
    parser.add_argument(
        "--class", dest="classes", type=request_class, action="append", metavar="JSON",
        help='such as {"name": "a", "rate": 20, "body": {"steps": 1}, "deadline_ms": 200}; may be repeated',
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return report.run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
