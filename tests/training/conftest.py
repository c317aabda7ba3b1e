"""Pictures in place of CIFAR-10, random LPIPS weights, and no loss curves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.training.helpers import pictures_like
from tests.training.test_stages import RandomLpips
from training.metrics import plots


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
