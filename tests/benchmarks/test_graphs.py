"""The benchmark of graphs at its smallest, on the tests' recorder, and the rule for the default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import graphs, kernels, naive, report, roofline
from tests.benchmarks.filed import filed


def test_smoke_files_every_lane_and_the_teacher(tmp_path: Path) -> None:
    options = ["--smoke", "--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--teacher"]
    assert graphs.main([*options, "--arithmetic", "exact32"]) == 0
    record, page = filed(tmp_path, "graphs")
    rows = record["results"]["rows"]
    assert [row["model"] for row in rows] == list(naive.SMOKE)
    for row in rows:
        seconds = row["seconds"]
        assert set(seconds) == {*graphs.LANES, "teacher"} and all(len(s) == 2 for s in seconds.values())
        assert row["exact_share"] == pytest.approx(report.paired_ratio(seconds["fast"], seconds["exact"]))
        assert row["teacher_over_fast"] == pytest.approx(
            report.paired_ratio(seconds["teacher"], seconds["fast"])
        )
        for near in row["agreement"].values():
            assert near["tokens"] > 0.99
    assert "a GPU's default:" in page and "unknown" not in page


def test_a_baseline_that_has_no_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 images of d16 its differences alone take 23 GB: the whole row was lost with it."""

    def fail(_: naive.Work) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(graphs, "naive", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    row = graphs.measure("LlamaGen-DD-smoke", 2, 1, torch.device("cpu"), "exact32", teacher=False)
    assert set(row["seconds"]) == {"eager", "exact", "fast"} and row["naive_over_fast"] is None
    assert row["exact_share"] > 0 and "| – |" in graphs.table({"rows": [row]})


def test_exact_is_the_default_where_it_costs_a_fifth_at_most_at_the_largest_batch() -> None:
    rows = [{"batch": 1, "exact_share": 0.1}, {"batch": 64, "exact_share": 0.8}]
    assert graphs.exact_is_default(rows) is True
    assert graphs.exact_is_default([*rows, {"batch": 64, "exact_share": 0.79}]) is False
    assert graphs.exact_is_default([]) is None


@pytest.mark.parametrize("option", [["--models", "d99"], ["--arithmetic", "int8"], ["--device", "abacus"]])
@pytest.mark.parametrize("command", [graphs.main, kernels.main, roofline.main])
def test_a_wrong_option_is_refused(
    tmp_path: Path, option: list[str], command: Callable[[list[str]], int]
) -> None:
    assert command(["--smoke", "--device", "cpu", "--out", str(tmp_path), *option]) == 2
    assert list(tmp_path.iterdir()) == []
