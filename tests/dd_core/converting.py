"""A small published model in files, for the tests of conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from dd_core.hub.pull import LocalFile
from dd_core.hub.spec import ModelSpec, PartName
from tests.hub import content_of, random_modules, saved, tiny_spec


def files_of(spec: ModelSpec, modules: dict[PartName, nn.Module], folder: Path) -> dict[PartName, LocalFile]:
    folder.mkdir(exist_ok=True)
    out: dict[PartName, LocalFile] = {}
    for part, remote in spec.files.items():
        path = folder / Path(remote.file).name
        path.write_bytes(saved(content_of(spec, part, modules[part])))
        out[part] = LocalFile.by_hand(part, path)
    return out


def replaced(files: dict[PartName, LocalFile], part: PartName, content: bytes) -> dict[PartName, LocalFile]:
    path = files[part].path
    path.write_bytes(content)
    return {**files, part: LocalFile.by_hand(part, path)}


def student_content(spec: ModelSpec, modules: dict[PartName, nn.Module]) -> tuple[Any, dict[str, Tensor]]:
    content = content_of(spec, "student", modules["student"])
    return content, content["trainer"]["ema_parameters"]


@pytest.fixture
def spec() -> ModelSpec:
    return tiny_spec("var-dd-d16")


@pytest.fixture
def modules(spec: ModelSpec) -> dict[PartName, nn.Module]:
    return random_modules(spec)


@pytest.fixture
def files(spec: ModelSpec, modules: dict[PartName, nn.Module], tmp_path: Path) -> dict[PartName, LocalFile]:
    return files_of(spec, modules, tmp_path / "files")
