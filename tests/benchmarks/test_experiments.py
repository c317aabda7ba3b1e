"""Overload and interference end to end at their smallest, and their arithmetic on numbers made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import interference, open_loop, overload
from benchmarks.client import Load, Outcome
from benchmarks.open_loop import OpenRun, Record, RequestClass
from benchmarks.processes import HOST, environment, serving
from benchmarks.report import BenchmarkError
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def _filed(out: Path, theme: str) -> tuple[dict[str, Any], str]:
    (path,) = (out / theme).glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert record["configuration"]["bundle"]["name"] == "tiny"
    return record, path.with_suffix(".md").read_text(encoding="utf-8")


def _common(folder: Path, out: Path) -> list[str]:
    return ["--bundle", str(folder), "--device", "cpu", "--threads", "1", "--out", str(out), "--smoke"]


def test_overload_files_goodput_over_a_capacity_of_the_same_run(folder: Path, tmp_path: Path) -> None:
    lanes = list(overload.LANES)
    assert overload.main([*_common(folder, tmp_path), "--lanes", *lanes]) == 0
    record, page = _filed(tmp_path, "overload")
    assert record["status"] == "ok"
    rows = record["results"]["rows"]
    assert [row["class"] for row in rows] == lanes
    for row in rows:
        assert sum(row["outcomes"].values()) == row["requests"] > 0
        assert set(row["outcomes"]) <= {"200", "429", "503", "504"}
        assert row["goodput_over_capacity"] == pytest.approx(row["goodput_per_s"] / row["capacity"]["per_s"])
        # Three times the capacity was offered, as far as chance decides over a second.
        assert row["offered_per_s"] > row["capacity"]["per_s"]
        assert row["sender"]["cpu_ms_per_request"] > 0
    assert len({row["deadline_ms"] for row in rows}) == 1, "all lanes are judged by one deadline"
    assert [row["lane"] for row in record["results"]["summary"]] == lanes
    assert "goodput ÷ capacity" in page


def test_a_load_below_capacity_is_filed_as_an_open_loop(folder: Path, tmp_path: Path) -> None:
    below = ["--factor", "0.5", "--lanes", "untold", "--deadline-ms", "5000", "--processes", "2"]
    assert overload.main([*_common(folder, tmp_path), *below]) == 0
    record, _ = _filed(tmp_path, "open-loop")
    assert record["configuration"]["options"]["processes"] == 2
    (row,) = record["results"]["rows"]
    assert row["offered_per_s"] < row["capacity"]["per_s"]


def test_interference_files_ratios_to_idle(folder: Path, tmp_path: Path) -> None:
    assert interference.main(_common(folder, tmp_path)) == 0
    record, page = _filed(tmp_path, "interference")
    assert record["status"] == "ok"
    rows = record["results"]["policies"]
    assert [row["policy"] for row in rows] == ["fair", "fifo"]
    for row in rows:
        idle, beside = row["idle"]["latency_ms"], row["beside"]["latency_ms"]
        assert row["p99_over_idle"] == pytest.approx(beside["p99"] / idle["p99"])
        assert row["aim_ms"] == pytest.approx(3 * idle["p99"] + row["pass_ms"])
        assert row["idle"]["requests"] == row["beside"]["requests"] > 0
        assert row["teacher_outcomes"]["200"] > 0 and row["pass_ms"] > 0
    assert "p99 ÷ idle" in page


def test_the_open_loop_loads_a_server_that_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = [
        '{"name": "image", "rate": 10, "body": {"steps": 1}}',
        '{"name": "json", "rate": 5, "body": {"steps": 2, "n": 2}, "accept": "application/json"}',
        '{"name": "wrong", "rate": 5, "body": {"steps": 0}}',
    ]
    options = [part for text in classes for part in ("--class", text)]
    with serving(str(folder), "cpu", 8, environment(1)) as server:
        url = f"http://{HOST}:{server.port}"
        assert open_loop.main(["--url", url, "--seconds", "2", "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert open_loop.main(["--url", url, "--seconds", "1"]) == 0
        assert "| one step |" in capsys.readouterr().out
    rows = {row["class"]: row for row in found["classes"]}
    assert set(rows) == {"image", "json", "wrong", "all"}
    for name, outcome in (("image", "200"), ("json", "200"), ("wrong", "400")):
        assert rows[name]["outcomes"] == {outcome: rows[name]["requests"]} and rows[name]["requests"] > 0
    assert rows["wrong"]["goodput_per_s"] == 0
    assert found["sender"]["connections"] >= 1


def test_told_and_untold_differ_in_the_field_alone() -> None:
    told, untold = (overload.request_class(lane, 9.0, 1, 250.0) for lane in overload.LANES)
    assert dict(untold.body) == {"steps": 1, "brownout": False}
    assert dict(told.body) == {**untold.body, "deadline_ms": 250.0}
    assert (told.rate, told.deadline_ms) == (untold.rate, untold.deadline_ms) == (9.0, 250.0)


def test_a_capacity_with_failures_is_none() -> None:
    good = [Outcome("capacity", "dd-1", 0.5, None)] * 8
    assert overload.capacity_row(Load(good, 2.0, 0.1))["per_s"] == 4
    with pytest.raises(BenchmarkError, match="status 429"):
        overload.capacity_row(Load([*good, Outcome("capacity", "", 0.1, "status 429")], 2.0, 0.1))


def _capacity(per_s: float) -> dict[str, Any]:
    """Of a machine that became slower meanwhile."""
    return overload.bracket({"per_s": per_s + 1, "latency_ms": {}}, {"per_s": per_s - 1, "latency_ms": {}})


def _overload_row(lane: str, good: int, capacity: float) -> dict[str, Any]:
    kind = overload.request_class(lane, 30.0, 1, 100.0)
    records = [Record(0, 0.1 * n, 0.1 * n, 0.1 * n + 0.05, 200, None) for n in range(good)]
    records += [Record(0, 0.1 * n, 0.1 * n, 0.1 * n + 0.002, 503, None) for n in range(30 - good)]
    run = OpenRun(records, [], 3.0, 0.03, 4)
    return overload.lane_row(1, kind, run, (0.0, 3.0), _capacity(capacity))


def test_overload_on_made_up_numbers() -> None:
    rows = [_overload_row("told", 27, 10.0), _overload_row("told", 24, 10.0), _overload_row("untold", 0, 8.0)]
    assert rows[0]["goodput_over_capacity"] == pytest.approx(0.9)
    told, untold = overload.summary(rows)
    assert told["goodput_over_capacity"] == pytest.approx(0.85) and told["kept"] == 1
    assert told["refusal_ms"]["p50"] == pytest.approx(2)
    assert (untold["goodput_over_capacity"], untold["kept"]) == (0, None)
    assert "| told | 0.85 | 100.0% | 2.0 | 2.0 |" in overload.table({"rows": rows, "summary": [told, untold]})


def _interference_row(beside_s: float, background: list[Record]) -> dict[str, Any]:
    kind = RequestClass("one step", 5.0)
    idle, beside = (
        OpenRun([Record(0, 1.0 * n, 1.0 * n, n + s, 200, None) for n in range(4)], background, 4.0, 0.1, 1)
        for s in (0.02, beside_s)
    )
    return interference.policy_row("fair", 10.0, kind, 4.0, idle, beside)


def test_interference_on_made_up_numbers() -> None:
    """Idle 20 ms and a pass of 10 ms allow 70 ms; what the background did before zero does not count."""
    background = [Record(1, -2.0, -2.0, -1.0, 200, None), Record(1, -1.0, -1.0, 2.0, 200, None)]
    row = _interference_row(0.14, background)
    assert row["p99_over_idle"] == pytest.approx(7) and row["aim_ms"] == pytest.approx(70)
    assert row["p99_over_aim"] == pytest.approx(2)
    assert row["teacher_outcomes"] == {"200": 1} and row["teacher_per_s"] == 0.25
    assert interference.failures(row) == []


def test_a_background_that_did_not_disturb_is_a_failure() -> None:
    assert interference.failures(_interference_row(0.14, [])) == [
        "fair: no teacher request was answered meanwhile"
    ]
    refused = _interference_row(0.14, [Record(1, 0.0, 0.0, 0.1, 429, None)])
    assert interference.failures(refused) == ["fair, teacher: 1 × 429"]


@pytest.mark.parametrize("command", [overload.main, interference.main])
def test_a_wrong_option_is_refused_and_files_nothing(tmp_path: Path, command: Any) -> None:
    assert command(["--bundle", "nowhere", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert command(["--device", "abacus", "--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []
