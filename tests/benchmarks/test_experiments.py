"""The arithmetic of overload and interference, on numbers made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import interference, overload
from benchmarks.client import Load, Outcome
from benchmarks.open_loop import OpenRun, Record, RequestClass
from benchmarks.report import BenchmarkError


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
