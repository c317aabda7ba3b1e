"""Pictures in place of CIFAR-10, and random LPIPS weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.training.helpers import pictures_like
from tests.training.test_stages import RandomLpips


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
