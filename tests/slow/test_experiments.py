"""Overload, interference and the open loop end to end, at their smallest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import interference, open_loop, overload
from benchmarks.processes import HOST, environment, serving
from tests.benchmarks.filed import filed
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def _filed(out: Path, theme: str) -> tuple[dict[str, Any], str]:
    record, page = filed(out, theme)
    assert record["configuration"]["bundle"]["name"] == "tiny"
    return record, page


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
        assert open_loop.main(["--url", url, "--seconds", "2", "--json", *options]) == 1, "one is refused"
        found = json.loads(capsys.readouterr().out)
        assert open_loop.main(["--url", url, "--seconds", "1"]) == 0
        assert "| one step |" in capsys.readouterr().out
    rows = {row["class"]: row for row in found["classes"]}
    assert set(rows) == {"image", "json", "wrong", "all"}
    for name, outcome in (("image", "200"), ("json", "200"), ("wrong", "400")):
        assert rows[name]["outcomes"] == {outcome: rows[name]["requests"]} and rows[name]["requests"] > 0
    assert rows["wrong"]["goodput_per_s"] == 0
    assert found["sender"]["connections"] >= 1
