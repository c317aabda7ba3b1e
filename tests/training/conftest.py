"""Stand-ins for CIFAR-10, the pictograms and their encoder, random LPIPS weights, and no loss curves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.training import fakes
from tests.training.helpers import pictures_like
from tests.training.test_stages import RandomLpips
from training.cli import app
from training.data import text as text_data
from training.metrics import caption_retrieval, plots


@pytest.fixture(autouse=True)
def _no_loss_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the updates; the run of test_pipeline.py, whose scope is wider, draws one."""
    monkeypatch.setattr(plots, "loss_curve", lambda *_: None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in place of CIFAR-10, in the file that the real data is kept in, and LPIPS weights."""
    cache = tmp_path_factory.mktemp("cache")
    images = {"train_images": pictures_like(256), "test_images": pictures_like(64, seed=1)}
    labels = {
        f"{s}_labels": (torch.arange(n) % 10).to(torch.uint8) for s, n in (("train", 256), ("test", 64))
    }
    save_file({**images, **labels}, str(cache / "cifar10.safetensors"))
    RandomLpips(cache)
    return cache


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """The stand-ins, and the corpus made of them by the command."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        fakes.install(cache, patch)
        RandomLpips(cache)
        patch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
        patch.setattr(caption_retrieval, "_STEPS", 20)
        patch.setattr(plots, "loss_curve", lambda *_: None)  # test_pipeline.py draws one
        said = CliRunner().invoke(app, ["corpus"])
        assert said.exit_code == 0, said.output
        assert "noto: noto 1.0.0, MIT, 40 pictures" in said.output
        yield patch
    text_data.encoder.cache_clear()
