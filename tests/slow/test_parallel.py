"""Two ranks that torchrun starts: the weights of one process, and a rank that is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training import ranks
from tests.training.test_stages import RandomLpips
from tests.training.torchrun import TORCHRUN, our_lines, said_at_the_end
from training.cli import main
from training.recipes.named import get_recipe
from training.stages.tokenizer import new_tokenizer


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state.double()
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}")


def _parts(folder: Path, family: str, stage: str) -> dict[str, Tensor]:
    """All trained and averaged tensors of a checkpoint."""
    saved = torch.load(folder / family / f"{stage}.pt", weights_only=True)["parts"]
    return {k: v for part in ("model", "ema", "codebook") for k, v in _tensors(saved.get(part, {}), part)}


def _figures(folder: Path, family: str, stage: str) -> list[dict[str, float]]:
    lines = (folder / family / f"{stage}.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("per_s", "left_s", "memory_gb")}
        for line in lines
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` by one process, `ranks` and `resumed` by two that torchrun started."""
    folder = tmp_path_factory.mktemp("parallel")
    RandomLpips(folder)
    command = [*TORCHRUN, "tests.training.ranks", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        with ranks.comparable():
            ranks.train(folder / "one", 1)
        said = started.communicate(timeout=300)[0]
    assert started.returncode == 0, said
    return folder


@pytest.mark.parametrize(("family", "stage"), [(f, s) for f, names in ranks.STAGES.items() for s in names])
def test_two_ranks_equal_one_process(folder: Path, family: str, stage: str) -> None:
    """Two ranks with two parts each, blocks recomputed, against one whole batch: three updates."""
    one, two = (_parts(folder / run, family, stage) for run in ("one", "ranks"))
    assert one.keys() == two.keys() and len(one) > 20
    far = {k: float((v - two[k]).abs().max()) for k, v in one.items() if v.numel()}
    # Before a tokenizer quantises, a code is one vector of the encoder, made one of unit length: what the
    # weights are off by is larger there. The codes are about 0.4 apart.
    loose = {k for k in far if family == "tiny" and "codebook" in k}
    assert max(v for k, v in far.items() if k not in loose) < 1e-5, max(far, key=lambda k: far[k])
    assert max((far[k] for k in loose), default=0.0) < 1e-2
    pairs = zip(
        _figures(folder / "one", family, stage), _figures(folder / "ranks", family, stage), strict=True
    )
    for alone, together in pairs:
        assert alone == pytest.approx(together, abs=1e-4, rel=1e-3)


def test_weights_move_in_those_updates(folder: Path) -> None:
    """By far more than they may differ, as their distance from their averages says."""
    for stage in ranks.STAGES["tiny"]:
        found = _parts(folder / "one", "tiny", stage)
        models = {k.removeprefix("model."): v for k, v in found.items() if k.startswith("model.")}
        moved = [float((v - found[f"ema.average.{k}"]).abs().max()) for k, v in models.items()]
        assert max(moved) > 3e-5, stage


def test_a_resumed_run_of_two_ranks_has_the_same_bits(folder: Path) -> None:
    for family in ranks.STAGES:
        straight, resumed = (_parts(folder / run, family, "teacher") for run in ("ranks", "resumed"))
        assert all(torch.equal(v, resumed[k]) for k, v in straight.items())
        assert _figures(folder / "ranks", family, "teacher") == _figures(
            folder / "resumed", family, "teacher"
        )


def test_ranks_encode_their_share_of_the_images(folder: Path) -> None:
    for family in ranks.STAGES:
        one, two = (torch.load(folder / run / family / "tokens.pt") for run in ("one", "ranks"))
        assert one.shape[:2] == (2, 7) and torch.equal(one, two)


def _with_tokens(out: Path) -> Path:
    """A run folder in which a teacher can be trained."""
    recipe = get_recipe("tiny")
    out.mkdir()
    tokenizer = new_tokenizer(recipe, ranks.CPU)
    save_file(dict(tokenizer.state_dict()), str(out / "tokenizer.safetensors"))
    tokens = torch.randint(64, (2, 32, 64), dtype=torch.int16)
    save_file(
        {"tokens": tokens, "labels": torch.arange(32, dtype=torch.int32) % 10},
        str(out / "tokens.safetensors"),
    )
    return out


def test_processes_that_do_not_divide_the_batch_say_so_in_one_line(tmp_path: Path) -> None:
    out = _with_tokens(tmp_path / "run")
    command = [*TORCHRUN, "training", "teacher", "--recipe", "tiny", "--out", str(out), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--set", "teacher.batch=7"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0 and not (out / "teacher.pt").exists()
    [line] = our_lines(done.stderr)
    assert "teacher.batch is 7, which 2 processes times accumulate=1 do not divide" in line


def test_a_killed_rank_ends_all_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so; the same command then finishes the stage, here by one process."""
    out = _with_tokens(tmp_path / "run")
    settings = ("teacher.steps=100", "save_every=4", "preview_every=1000")
    command = ["teacher", "--recipe", "tiny", "--out", str(out), "--device", "cpu"]
    command += [argument for item in settings for argument in ("--set", item)]
    [line] = said_at_the_end([*TORCHRUN, "training", *command], (out / "teacher.pt").exists)
    assert "another rank" in line and "goes on from the last checkpoint" in line
    assert not (out / "teacher.safetensors").exists()
    monkeypatch.setattr(sys, "argv", ["dd-train", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert load_file(out / "teacher.safetensors")
    steps = [json.loads(line)["step"] for line in (out / "teacher.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 102, 2)), "by one rank, each step once"
    assert "resumed at step" in (out / "train.log").read_text()
