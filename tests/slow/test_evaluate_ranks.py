"""An evaluation by two processes: the figures of one; and one that goes on after a process was killed."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dd_core.models.build import new_student
from tests.tiny import tiny_bundle
from tests.training.fakes import Mean
from tests.training.helpers import draw_folder
from tests.training.torchrun import TORCHRUN, said_at_the_end
from training.guidance import scales_of, sweep
from training.measure import Request, Subject, measure
from training.recipes.named import get_recipe
from training.run import Run, save
from training.stages import evaluate, pairs
from training.stages.teacher import new_teacher
from training.stages.tokenizer import new_tokenizer

CPU = torch.device("cpu")
GIVEN = (
    *("evaluate.images=22", "evaluate.reference=40", "evaluate.test=24", "evaluate.batch=4"),
    *("pairs.count=16", 'evaluate.plans=["dd-1", "onestep"]'),
)


@pytest.fixture(autouse=True)
def _surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a report without times."""
    rows = json.loads((folder / "evaluation.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("ms_per_image", "images_per_s")} for row in rows]


def test_two_ranks_measure_a_run_as_one_process_does(tmp_path: Path) -> None:
    recipe = get_recipe("tiny", GIVEN)
    run = Run(recipe, tmp_path / "one", CPU)
    run.out.mkdir()
    tokenizer = new_tokenizer(recipe, CPU)
    parts = {"tokenizer": tokenizer, "decoder": tokenizer, "teacher": new_teacher(recipe, tokenizer, CPU)}
    for name, part in {**parts, "student": new_student(recipe.student)}.items():
        save(run, name, part)
    pairs.run(run)
    shutil.copytree(run.out, tmp_path / "two")
    evaluate.run(run, Mean(), timing=False)
    command = [*TORCHRUN, "tests.training.measuring", "evaluate", "--recipe", "tiny", "--device", "cpu"]
    command += ["--out", str(tmp_path / "two"), *(part for item in GIVEN for part in ("--set", item))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name / "evaluation" for name in ("one", "two"))
    assert [row["name"] for row in _rows(two)] == [
        "dd-1",
        "onestep",
        "reconstruction",
        "real-test",
        "real-split",
    ]
    for alone, together in zip(_rows(one), _rows(two), strict=True):
        assert together == pytest.approx(alone)
    for name in ("dd-1", "onestep"):
        drawn = [load_file(folder / "samples" / f"{name}.safetensors")["images"] for folder in (one, two)]
        assert len(drawn[0]) == 22 and torch.equal(*drawn)
    said = (tmp_path / "two" / "train.log").read_text()
    assert "dd-1: 8/22" in said, "a batch of each rank at once"


def test_two_ranks_measure_scales_of_guidance_as_one_process_does(tmp_path: Path) -> None:
    recipe = get_recipe("var-tiny", GIVEN[:-1])
    run = Run(recipe, tmp_path / "one", CPU)
    run.out.mkdir()
    tokenizer = new_tokenizer(recipe, CPU)
    save(run, "tokenizer", tokenizer)
    save(run, "teacher", new_teacher(recipe, tokenizer, CPU))
    shutil.copytree(run.out, tmp_path / "two")
    rows = sweep(run, scales_of("1", "2"), 22, Mean())
    command = [*TORCHRUN, "tests.training.measuring", "guidance", "--recipe", "var-tiny", "--device", "cpu"]
    command += ["--constant", "1", "--linear", "2", "--images", "22", "--out", str(tmp_path / "two")]
    command += [part for item in GIVEN[:-1] for part in ("--set", item)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| linear 2 | 22 against 40 |") == 1, "rank 0 shows the table"
    record = json.loads((tmp_path / "two" / "guidance" / "guidance.json").read_text())
    for alone, together in zip(rows, record["rows"], strict=True):
        assert together == pytest.approx(asdict(alone))
    assert "teacher: 8/22" in (tmp_path / "two" / "train.log").read_text(), "a batch of each rank at once"


def test_a_killed_rank_ends_the_evaluation_of_a_bundle_which_then_goes_on(tmp_path: Path) -> None:
    bundle, out = tiny_bundle(tmp_path / "bundle"), tmp_path / "two"
    real = draw_folder(tmp_path / "real", {"a": 9, "b": 9}, (32, 32))
    request = Request(real, images=164, plans=("teacher",), batch=8, timing=False)
    measure(Subject.of_bundle(str(bundle), CPU), request, Mean(), tmp_path / "one")
    command = [*TORCHRUN, "tests.training.measuring", "evaluate", str(bundle), "--reference", str(real)]
    command += ["--images", "164", "--plans", "teacher", "--batch", "8", "--no-timing"]
    command += ["--device", "cpu", "--out", str(out)]
    [line] = said_at_the_end(command, lambda: any(out.glob("chunks/teacher/*.safetensors")))
    assert "another rank" in line and "the same command goes on" in line
    assert not (out / "evaluation.json").exists()
    assert 1 <= len(list(out.glob("chunks/teacher/*.safetensors"))) < 21
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("| teacher | 64 | 164 against 18 |") == 1, "printed by rank 0 alone"
    for alone, together in zip(_rows(tmp_path / "one"), _rows(out), strict=True):
        assert together == pytest.approx(alone)
