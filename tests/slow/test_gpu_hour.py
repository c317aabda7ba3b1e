"""The three calls for a borrowed GPU, on the CPU in their smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_hour


@pytest.mark.parametrize("call", gpu_hour.CALLS)
def test_every_step_of_a_call_works(tmp_path: Path, call: str) -> None:
    """Tests of a GPU are skipped on a CPU."""
    arguments = [call, "--tiny", "--device", "cpu", "--out", str(tmp_path), "--slow", "10"]
    failed = gpu_hour.main(arguments)
    found = json.loads((tmp_path / f"{call}.json").read_text(encoding="utf-8"))
    assert not failed, [(row["step"], row["said"][-500:]) for row in found if not row["good"]]
