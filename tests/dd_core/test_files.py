"""Files of weights and who may read them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dd_core.files import metadata_of, save_tensors
from tests.tiny import tiny_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_bundle_can_be_read_by_whom_the_umask_lets(umask: int, tmp_path: Path) -> None:
    """The container's user is not the one who exported; safetensors makes files for their owner alone."""
    folder = tiny_bundle(tmp_path / "tiny")
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.ones(2)}, path, {"made": "here"})
    with pytest.raises((SafetensorError, RuntimeError, ValueError)):
        save_tensors({"a": torch.ones(2, 2).T}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert metadata_of(path) == {"made": "here"}
    assert list(tmp_path.iterdir()) == [path]
    assert metadata_of(tmp_path / "b.safetensors") == {}


def test_no_other_code_writes_safetensors() -> None:
    packages = ("dd_core", "training", "server", "distilled_decoding")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    callers = [path for path in files if re.search(r"\bsave_file\b", path.read_text(encoding="utf-8"))]
    assert callers == [ROOT / "dd_core" / "files.py"]
