"""Files that are no checkpoint, another one's, damaged or hostile: refused by name, nothing is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dd_core.errors import WeightsError
from dd_core.hub.convert import convert
from dd_core.hub.pull import LocalFile
from dd_core.hub.spec import ModelSpec, PartName
from tests.dd_core.converting import files as files
from tests.dd_core.converting import modules as modules
from tests.dd_core.converting import replaced, student_content
from tests.dd_core.converting import spec as spec
from tests.hub import saved


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("layerwise_n_d_embed.2.weight"), "missing layerwise_n_d_embed.2.weight"),
        (
            lambda s: s.update({"head.weight": torch.zeros(64, 31)}),
            r"head.weight has shape \[64, 31\], needs \[64, 32\]",
        ),
        (lambda s: s.update({"backdoor": torch.zeros(1)}), "unexpected backdoor"),
        (
            lambda s: s.update({"head.bias": torch.zeros(64, dtype=torch.int64)}),
            "head.bias has type torch.int64",
        ),
        (lambda s: s.update({"attn_bias_for_masking": torch.zeros(3, 3)}), "attn_bias_for_masking has shape"),
    ],
)
def test_other_tensors_than_the_architectures_are_named_and_nothing_is_written(
    spec: ModelSpec,
    modules: dict[PartName, nn.Module],
    files: dict[PartName, LocalFile],
    tmp_path: Path,
    change: Any,
    says: str,
) -> None:
    content, state = student_content(spec, modules)
    change(state)
    with pytest.raises(WeightsError, match=says):
        convert(spec, replaced(files, "student", saved(content)), tmp_path / "bundle")
    assert not list(tmp_path.glob("*bundle*/*"))


class Armed:
    """What a hostile file would hold: unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_code_is_refused_and_none_is_run(
    spec: ModelSpec,
    modules: dict[PartName, nn.Module],
    files: dict[PartName, LocalFile],
    tmp_path: Path,
    zipped: bool,
) -> None:
    content, _ = student_content(spec, modules)
    content["args"] = Armed(str(tmp_path / "pwned"))
    hostile = saved(content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"more than weights.*(mkdir|refused)"):
        convert(spec, replaced(files, "student", hostile), tmp_path / "bundle")
    assert not (tmp_path / "pwned").exists()


def test_a_training_scripts_arguments_are_harmless(
    spec: ModelSpec, modules: dict[PartName, nn.Module], files: dict[PartName, LocalFile], tmp_path: Path
) -> None:
    import argparse

    content, _ = student_content(spec, modules)
    content["args"] = argparse.Namespace(lr=1e-4, name="run")
    convert(spec, replaced(files, "student", saved(content)), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged"),
        (b"not a checkpoint at all", "damaged"),
        (saved({"model": {"a": torch.zeros(2)}})[:-40], "damaged"),
        (saved({"optimizer": {}, "step": 3}), "the file holds optimizer, step"),
        (saved([1, 2]), "the file holds list"),
    ],
)
def test_a_damaged_or_other_file_is_one_clear_error(
    spec: ModelSpec, files: dict[PartName, LocalFile], tmp_path: Path, content: bytes, says: str
) -> None:
    with pytest.raises(WeightsError, match=says) as caught:
        convert(spec, replaced(files, "student", content), tmp_path / "bundle")
    assert "\n" not in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.pt: No such file"):
        LocalFile.by_hand("teacher", tmp_path / "gone.pt")
