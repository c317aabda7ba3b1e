"""LPIPS weights out of a flax checkpoint, which is a pickle: arrays only."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dd_core.errors import WeightsError
from training.losses.lpips import Lpips, from_flax

_SIZES = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def checkpoint() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """All arrays of the right shapes, each of its own number."""
    tree: dict[str, dict[str, dict[str, np.ndarray]]] = {"VGG16_0": {}}
    before = 3
    for k, size in enumerate(_SIZES):
        kernel = np.zeros((3, 3, before, size), np.float32)
        kernel[1, 2, 0, 5] = k + 1
        tree["VGG16_0"][f"Conv_{k}"] = {"kernel": kernel, "bias": np.full(size, k, np.float32)}
        before = size
    for k, size in enumerate((64, 128, 256, 512, 512)):
        tree[f"NetLinLayer_{k}"] = {"Conv_0": {"kernel": np.full((1, 1, size, 1), k, np.float32)}}  # type: ignore[dict-item]
    return tree


def test_the_arrays_get_our_names_and_order(tmp_path: Path) -> None:
    found = from_flax(pickle.dumps(checkpoint(), protocol=3))
    assert found["features.28.weight"].shape == (512, 512, 3, 3)
    assert found["features.28.weight"][5, 0, 1, 2] == 13 and found["features.0.weight"][5, 0, 1, 2] == 1
    assert found["features.10.bias"][0] == 4 and found["lin4.weight"].shape == (1, 512, 1, 1)
    save_file(found, str(tmp_path / "lpips.safetensors"))
    one = Lpips(tmp_path / "lpips.safetensors")
    save_file({**found, "lin0.weight": found["lin0.weight"] + 1}, str(tmp_path / "other.safetensors"))
    assert one.fingerprint != Lpips(tmp_path / "other.safetensors").fingerprint
    assert one.fingerprint == Lpips(tmp_path / "lpips.safetensors").fingerprint
    assert torch.isfinite(one(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32))).all()


class _Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("was-here",)


def test_nothing_in_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {"first": _Command(), **checkpoint()}
    assert len(from_flax(pickle.dumps(tree, protocol=3))) == 2 * 13 + 5
    assert not (tmp_path / "was-here").exists()


def test_arrays_of_another_network_are_refused() -> None:
    tree = checkpoint()
    del tree["NetLinLayer_3"]
    with pytest.raises(WeightsError, match="VGG16"):
        from_flax(pickle.dumps(tree, protocol=3))
    with pytest.raises(WeightsError, match="read"):
        from_flax(b"no pickle")
