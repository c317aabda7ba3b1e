"""The state dict inside a checkpoint, wherever a training script put it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dd_core.bundle import load_bundle
from dd_core.hub.checkpoint import state_dict_at
from dd_core.hub.convert import convert
from dd_core.hub.pull import LocalFile
from dd_core.hub.registry import find_spec
from tests.hub import content_of, random_modules, saved, tiny_spec
from tests.upstream import reference_state


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str) -> None:
    state = {"head.weight": torch.ones(2), "module_like.bias": torch.zeros(1)}
    trained = {
        "epoch": 1,
        "trainer": {"var_wo_ddp": {prefix + k: v for k, v in state.items()}, "var_opt": {}},
    }
    found, place = state_dict_at(trained, find_spec("var-d16").files["teacher"].places, "file")
    assert found == state and place == ("trainer", "var_wo_ddp")


def test_a_prefix_of_some_keys_is_a_name() -> None:
    state = {"module.weight": torch.ones(2), "bias": torch.zeros(1)}
    assert state_dict_at(state, ((),), "file")[0].keys() == state.keys()


def test_a_teacher_of_vars_own_training_script_is_converted(tmp_path: Path) -> None:
    """It keeps the model beside its tokenizer and optimizer, in DistributedDataParallel's names."""
    spec = tiny_spec("var-d16")
    modules = random_modules(spec)
    state = {f"module.{key}": value for key, value in reference_state(modules["teacher"]).items()}
    trained = {"iter": 2, "trainer": {"var_wo_ddp": state, "var_opt": {"param_groups": [{"lr": 1e-4}]}}}
    files = {}
    for part in spec.files:
        path = tmp_path / f"{part}.pth"
        path.write_bytes(saved(trained if part == "teacher" else content_of(spec, part, modules[part])))
        files[part] = LocalFile.by_hand(part, path)
    convert(spec, files, tmp_path / "bundle")
    loaded = load_bundle(tmp_path / "bundle", torch.device("cpu")).sampler.teacher
    assert isinstance(loaded, torch.nn.Module)
    expected = modules["teacher"].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
