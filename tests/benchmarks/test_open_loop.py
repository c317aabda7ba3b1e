"""The open loop: its schedule and arithmetic without a server, its sender against servers that misbehave."""

from __future__ import annotations

import json
import socketserver
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks import open_loop
from benchmarks.open_loop import Arrival, OpenRun, Record, RequestClass, run_open_loop, schedule, summarise
from dd_core.errors import InvalidRequestError

PATIENCE = 60.0
FAST = RequestClass("fast", 100.0, {"steps": 1}, deadline_ms=100.0)
PNG = b"\x89PNG\r\n\x1a\n and so on"


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps have the mean and, unlike evenly spaced or uniform ones, the deviation of an exponential."""
    times = [arrival.at for arrival in schedule([FAST], 200.0, seed=3)]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0 and times[-1] < 200.0
    assert statistics.mean(gaps) == pytest.approx(0.01, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.01, rel=0.05)


def test_a_schedule_depends_on_its_seed_alone() -> None:
    assert schedule([FAST], 5.0, seed=1) == schedule([FAST], 5.0, seed=1)
    assert schedule([FAST], 5.0, seed=1) != schedule([FAST], 5.0, seed=2)


def test_a_class_does_not_move_the_arrivals_of_another() -> None:
    slow = RequestClass("slow", 7.0, {"steps": 64})
    both = schedule([slow, FAST], 5.0, seed=1, labels=10)
    assert [a.at for a in both] == sorted(a.at for a in both)
    alone = schedule([FAST], 5.0, seed=1, labels=10)
    assert [(a.at, a.body) for a in both if a.kind == 1] == [(a.at, a.body) for a in alone]


def test_every_request_has_a_seed_of_its_own_and_a_class_in_turn() -> None:
    found = [json.loads(text) for text in open_loop.bodies(FAST, 5, labels=3)]
    assert [body["label"] for body in found] == [0, 1, 2, 0, 1]
    assert [body["seed"] for body in found] == [0, 1, 2, 3, 4]
    assert all(body["steps"] == 1 for body in found)
    fixed = RequestClass("fixed", 1.0, {"label": "ship", "seed": 7})
    assert {*open_loop.bodies(fixed, 3, labels=3)} == {'{"label": "ship", "seed": 7}'}


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="rate"):
        schedule([RequestClass("never", 0.0)], 1.0, seed=0)


def _record(at: float, done: float | None, status: int, kind: int = 0, failure: str | None = None) -> Record:
    return Record(kind, at, at + 0.001, done, status, failure)


def test_rows_on_made_up_numbers() -> None:
    """Ten seconds: what is good, what is late, what was refused at once and what was dropped later."""
    records = [
        _record(1.0, 1.05, 200),
        _record(2.0, 2.09, 200),  # just in time
        _record(3.0, 3.3, 200),  # late
        _record(4.0, 4.002, 429),
        _record(5.0, 5.004, 503),
        _record(6.0, 6.2, 504),  # taken, then dropped
        _record(7.0, 7.05, 200, failure="unexpected body"),
        _record(8.0, None, 0),
        _record(10.0, 10.05, 200),  # after the window
    ]
    (row,) = summarise([FAST], records, (0.0, 10.0))
    assert (row["class"], row["requests"], row["offered_per_s"]) == ("fast", 8, 0.8)
    assert row["outcomes"] == {"200": 3, "429": 1, "503": 1, "504": 1, "no reply": 1, "unexpected body": 1}
    assert (row["in_time"], row["goodput_per_s"], row["kept"]) == (2, 0.2, pytest.approx(2 / 6))
    assert row["latency_ms"]["p50"] == pytest.approx(90) and row["latency_ms"]["p99"] == pytest.approx(295.8)
    assert row["refusal_ms"]["p50"] == pytest.approx(3)


def test_latency_counts_from_the_schedule_not_from_sending() -> None:
    """A server that stops for a second owes it to everyone who came meanwhile, sent or not."""
    stalled = [Record(0, at, 1.0, 1.01, 200, None) for at in (0.0, 0.5)]
    (row,) = summarise([RequestClass("any", 2.0)], stalled, (0.0, 1.0))
    assert row["latency_ms"]["p99"] == pytest.approx(1005)
    assert row["in_time"] == 2, "without a deadline any reply is in time"
    run = OpenRun(stalled, [], 1.01, 0.1, 1)
    assert open_loop.sender_facts(run)["late_ms"]["p50"] == pytest.approx(750)


def test_classes_have_rows_of_their_own_and_one_together() -> None:
    slow = RequestClass("slow", 1.0, {}, deadline_ms=1000.0)
    records = [_record(0.1, 0.3, 200, kind=0), _record(0.2, 0.4, 200, kind=1), _record(0.3, 0.301, 429)]
    rows = {row["class"]: row for row in summarise([FAST, slow], records, (0.0, 2.0))}
    assert {name: row["goodput_per_s"] for name, row in rows.items()} == {"fast": 0, "slow": 0.5, "all": 0.5}
    assert rows["fast"]["kept"] == 0 and rows["slow"]["kept"] == 1 and rows["slow"]["refusal_ms"] is None
    page = open_loop.table(list(rows.values()))
    assert "1 × 200, 1 × 429" in page and "| slow | 0.5 | 0.5 | 100.0% |" in page


def test_nothing_at_all_has_a_row() -> None:
    (row,) = summarise([FAST], [], (0.0, 1.0))
    assert row["latency_ms"] is None and row["kept"] is None
    assert open_loop.table([row])


Answer = Callable[["Handler", bytes], None]


class Handler(socketserver.StreamRequestHandler):
    """Reads requests of one connection and gives each to the test's function."""

    def handle(self) -> None:
        while head := self._head():
            length = next(int(line.split(b":")[1]) for line in head if line.startswith(b"content-length"))
            self.server.answer(self, self.rfile.read(length))

    def _head(self) -> list[bytes]:
        lines: list[bytes] = []
        while (line := self.rfile.readline()) and line != b"\r\n":
            lines.append(line.lower())
        return lines

    def reply(self, content: bytes = PNG, more: bytes = b"") -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b\r\n%b" % (len(content), more, content))

    def leave(self) -> None:
        self.connection.shutdown(2)


class Stub(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@contextmanager
def stub(answer: Answer) -> Iterator[tuple[str, int]]:
    with Stub(("127.0.0.1", 0), Handler) as server:
        server.answer = answer
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address
        server.shutdown()
        thread.join(PATIENCE)


def _send(answer: Answer, count: int, **more: Any) -> OpenRun:
    with stub(answer) as address:
        arrivals = [Arrival(0.001 * number, 0, json.dumps({"seed": number})) for number in range(count)]
        return run_open_loop(address, [FAST], arrivals, **more)


def test_requests_are_sent_although_none_is_answered() -> None:
    """The server keeps all waiting until it has all: any loop that waits for replies would stop here."""
    here = threading.Barrier(50, timeout=PATIENCE)

    def answer(handler: Handler, body: bytes) -> None:
        here.wait()
        handler.reply()

    run = _send(answer, 50)
    assert [record.outcome for record in run.records] == ["200"] * 50
    assert run.connections == 50
    assert all(record.at <= record.sent < record.done for record in run.records)


def test_connections_are_used_again() -> None:
    bodies = []

    def answer(handler: Handler, body: bytes) -> None:
        bodies.append(json.loads(body)["seed"])
        handler.reply()

    with stub(answer) as address:
        arrivals = [Arrival(0.1 * number, 0, json.dumps({"seed": number})) for number in range(10)]
        run = run_open_loop(address, [FAST], arrivals)
    assert all(record.good for record in run.records)
    assert run.connections < 10 and bodies == list(range(10))


def test_a_connection_that_closes_between_requests_costs_no_request() -> None:
    """As servers do with idle connections, without a word: the request goes out on a new one."""
    served = set()

    def answer(handler: Handler, body: bytes) -> None:
        if handler in served:
            handler.leave()
            return
        served.add(handler)
        handler.reply()

    with stub(answer) as address:
        arrivals = [Arrival(0.05 * number, 0, "{}") for number in range(8)]
        run = run_open_loop(address, [FAST], arrivals)
    assert [record.outcome for record in run.records] == ["200"] * 8


def _raw(data: bytes) -> Answer:
    return lambda handler, _: handler.wfile.write(data)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (lambda handler, _: handler.reply(b"not an image"), "unexpected body"),
        (lambda handler, _: handler.reply(more=b"connection: close\r\n"), "200"),
        (lambda handler, _: handler.leave(), "connection lost"),
        (_raw(b"SSH-2.0-OpenSSH\r\n\r\n"), "no HTTP/1.1 reply with a length"),
        (_raw(b"HTTP/1.1 200 OK\r\ncontent-le"), "no reply"),
        (_raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n\x89PNG"), "no reply"),
    ],
)
def test_what_is_no_good_reply_is_told(monkeypatch: pytest.MonkeyPatch, answer: Answer, outcome: str) -> None:
    monkeypatch.setattr(open_loop, "_PATIENCE", 0.5)
    run = _send(answer, 3)
    assert [record.outcome for record in run.records] == [outcome] * 3
    assert [record.good for record in run.records] == [outcome == "200"] * 3
    assert [open_loop.went_well(record) for record in run.records] == [outcome == "200"] * 3


@pytest.mark.parametrize(
    ("status", "fair"), [(429, True), (503, True), (504, True), (400, False), (500, False)]
)
def test_a_load_of_refused_requests_is_no_success(status: int, fair: bool) -> None:
    def answer(handler: Handler, _: bytes) -> None:
        handler.wfile.write(b"HTTP/1.1 %d No\r\ncontent-length: 2\r\n\r\n{}" % status)

    run = _send(answer, 2)
    assert [record.outcome for record in run.records] == [str(status)] * 2
    assert [open_loop.went_well(record) for record in run.records] == [fair] * 2


def test_nobody_listens() -> None:
    with stub(lambda *_: None) as address:
        pass
    run = run_open_loop(address, [FAST], [Arrival(0.0, 0, "{}")])
    assert run.records[0].outcome == "ConnectionRefusedError"
    assert open_loop.main(["--url", f"http://{address[0]}:{address[1]}"]) == 2


def test_a_background_goes_on_until_the_schedule_ends() -> None:
    """Two clients, each with one request at a time, from before zero; their requests repeat."""
    lock, at_once, seen = threading.Lock(), 0, []

    def answer(handler: Handler, body: bytes) -> None:
        nonlocal at_once
        with lock:
            at_once += json.loads(body)["seed"] >= 100
            seen.append((json.loads(body)["seed"], at_once))
        threading.Event().wait(0.01)
        with lock:
            at_once -= json.loads(body)["seed"] >= 100
        handler.reply()

    with stub(answer) as address:
        arrivals = [Arrival(0.05 * number, 0, json.dumps({"seed": number})) for number in range(10)]
        repeated = [Arrival(0.0, 1, json.dumps({"seed": seed})) for seed in (100, 101, 102)]
        run = run_open_loop(address, [FAST, FAST], arrivals, background=(2, repeated), lead=0.2)
    assert [record.outcome for record in run.records] == ["200"] * 10
    assert {record.kind for record in run.background} == {1} and len(run.background) > 10
    assert min(record.at for record in run.background) < 0 < max(record.at for record in run.background)
    assert max(number for _, number in seen) == 2
    assert {seed for seed, _ in seen if seed >= 100} == {100, 101, 102}


@pytest.mark.parametrize(
    "option",
    [["--url", "https://127.0.0.1:1"], ["--url", "here"]],
)
def test_a_wrong_address_is_refused(option: list[str]) -> None:
    assert open_loop.main(option) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"rate": 1}', '{"name": "a", "rate": "1"}', '{"nam": "a"}'])
def test_a_wrong_class_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        open_loop.main(["--class", text])
    assert "JSON object of name" in capsys.readouterr().err
