"""What a stage says of its progress: in its journal, in its log, and to TensorBoard."""

from __future__ import annotations

import json
import logging
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dd_core.errors import RecipeError
from training.optim import progress
from training.optim.loop import Batches, Ema, Stage, run_stage
from training.optim.progress import Pace, peak_memory
from training.recipes.named import get_recipe
from training.run import Run, train


def _stage(steps: int = 6) -> Stage:
    """Batches of 8 of 20 images: an epoch is two updates."""
    model = nn.Linear(2, 2)

    def update(step: int) -> dict[str, Tensor]:
        return {"loss": torch.tensor(1.0 / (step + 1))}

    def preview(path: Path) -> None:
        Image.new("RGB", (4, 4), (10, 20, 30)).save(path)

    return Stage("toy", steps, {"model": model}, update, Batches(20, 8, 0), preview)


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "toy.jsonl").read_text().splitlines()]


def test_a_line_has_images_epochs_rate_time_left_and_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dd_train"):
        run_stage(_stage(), tmp_path, seed=0, log_every=2)
    first, _, last = _lines(tmp_path)
    assert [first[k] for k in ("step", "images", "epochs")] == [2, 16, 1.0]
    assert [last[k] for k in ("step", "images", "epochs", "left_s")] == [6, 48, 3.0, 0.0]
    assert first["left_s"] == pytest.approx(4 / first["per_s"], rel=0.01, abs=0.06)
    assert 0.05 < last["memory_gb"] < 1000 and last["loss"] == pytest.approx((1 / 5 + 1 / 6) / 2)
    said = caplog.records[-1].getMessage()
    assert re.fullmatch(
        r"toy 6/6 [\d.]+/s, 48 images, 3\.00 epochs, 0:00:00 left, [\d.]+ GB: loss=0\.1833", said
    )


def test_images_count_from_the_beginning_and_the_rate_from_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    pace = Pace(first=30, steps=100, batch=8, per_epoch=4)
    found = pace.at(50)  # 20 updates in 10 seconds
    assert (found.images, found.epochs, found.per_s, found.left_s) == (400, 12.5, 2.0, 25.0)


def test_a_stage_goes_on_over_a_line_that_is_half_written(tmp_path: Path) -> None:
    """As by a disk that was full."""
    run_stage(_stage(), tmp_path, seed=0, log_every=2, save_every=2, stop_after=4)
    with (tmp_path / "toy.jsonl").open("a") as journal:
        journal.write('{"step": 6, "lo')
    run_stage(_stage(), tmp_path, seed=0, log_every=2, save_every=2)
    steps = [json.loads(line)["step"] for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and {2, 4, 6} <= set(steps)


@pytest.mark.skipif(sys.platform != "linux", reason="compares with what Linux says")
def test_memory_is_the_most_that_was_resident() -> None:
    status = Path("/proc/self/status").read_text()
    kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert peak_memory() == pytest.approx(kilobytes * 1024, rel=0.05)


def test_tensorboard_that_is_not_installed_is_asked_for_by_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    run_stage(_stage(), tmp_path / "without", seed=0)
    with pytest.raises(RecipeError, match=r"pip install 'distilled-decoding\[tensorboard\]'"):
        run_stage(_stage(), tmp_path / "with", seed=0, tensorboard=True)
    assert not (tmp_path / "with" / "toy.jsonl").exists()


def test_the_recipe_asks_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    run = Run(get_recipe("tiny", ["tensorboard=true"]), tmp_path, torch.device("cpu"))
    stage = _stage()
    with pytest.raises(RecipeError, match="tensorboardX"):
        train(run, stage, Ema(stage.parts["model"], 0.9), nn.Linear(2, 2))


def _events(folder: Path) -> list[object]:
    """Every event of a folder's files, in the order of their names, without the writer's own reader."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_gets_the_figures_of_the_journal_and_the_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run_stage(_stage(), tmp_path, seed=0, log_every=2, save_every=2, stop_after=4, tensorboard=True)
    run_stage(_stage(), tmp_path, seed=0, log_every=2, tensorboard=True)
    events = _events(tmp_path / "tensorboard" / "toy")
    values = [(e.step, v) for e in events for v in e.summary.value]
    loss = {step: v.simple_value for step, v in values if v.tag == "loss"}
    assert loss == pytest.approx({line["step"]: line["loss"] for line in _lines(tmp_path)})
    assert [v.simple_value for step, v in values if v.tag == "images"] == [16, 32, 48]
    [(step, picture)] = [(step, v.image) for step, v in values if v.tag == "samples"]
    assert step == 6 and (picture.height, picture.width) == (4, 4)
    assert [e.step for e in events if e.session_log.status == 1] == [5]  # events from there on are void
