"""The way from hub to image at its smallest."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import full_size
from tests.benchmarks.test_full_size import NAME, record_of
from tests.hub import tiny_spec


def test_smoke_goes_all_the_way_and_files_each_steps_own_peak(tmp_path: Path) -> None:
    """Steps are processes: what this one holds does not show in their peaks."""
    block = torch.ones(2**28)  # 1 GiB
    options = ["--smoke", "--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--models", NAME]
    (tmp_path / "scratch").mkdir()
    assert full_size.main([*options, "--scratch", str(tmp_path / "scratch")]) == 0
    record = record_of(tmp_path)
    assert record["status"] == "ok" and record["configuration"]["threads"] == 1
    assert record["configuration"]["bundle"]["name"] == "random weights"
    found = record["results"]["models"][NAME]
    assert found["published_bytes"] > 1e6
    for step in ("pull", "convert", "serve"):
        assert found[step]["seconds"] > 0
        assert 50e6 < found[step]["peak_bytes"] < block.numel() * 4
    plans = {row["plan"]: row["passes"] for row in found["plans"]}
    assert plans == {entry.name: entry.cost for entry in tiny_spec(NAME).presets}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in found["plans"])
    assert list((tmp_path / "scratch").iterdir()) == [], "gigabytes must not stay behind"
