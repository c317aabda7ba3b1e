"""An ablation on several ranks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.training.test_ablation import _surroundings as _surroundings
from tests.training.test_ablation import copy_of, train
from tests.training.test_ablation import with_pairs as with_pairs
from tests.training.torchrun import TORCHRUN


def test_two_ranks_draw_the_curves_of_one_process(with_pairs: Path, tmp_path: Path) -> None:
    one, two = (copy_of(with_pairs, tmp_path / name).out for name in ("one", "two"))
    command = ["ablate", "timesteps", "--steps", "8", "--updates", "4", "--every", "2", "--images", "16"]
    assert train(one, *command) == 0
    done = subprocess.run(
        [*TORCHRUN, "tests.training.measuring", *command, "--device", "cpu", "--out", str(two)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone, together = (
        json.loads((out / "ablation-timesteps" / "ablation.json").read_text()) for out in (one, two)
    )
    assert together["teacher"] == pytest.approx(alone["teacher"])
    assert [p["updates"] for p in together["points"]] == [2, 4, 2, 4]
    for mine, theirs in zip(alone["points"], together["points"], strict=True):
        assert theirs.pop("plan") == mine.pop("plan")
        assert theirs == pytest.approx(mine, rel=0.05), "sums of gradients in another order"
