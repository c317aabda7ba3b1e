"""Files by anybody: a changed safetensors header, a changed tokenizer, and what is no file at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dd_core.bundle import load_bundle
from dd_core.errors import BundleError, DDError, ManifestError, WeightsError
from dd_core.text.minilm import read_tokenizer
from tests.dd_core.small_text import TEXT, pieces_file
from tests.mutations import changed, changes

CPU = torch.device("cpu")


def _put(folder: Path, file: str, data: bytes) -> None:
    """Replace a file, and make the manifest agree with it."""
    (folder / file).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def folder(bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


def test_a_changed_header_is_refused_or_the_model_is_the_same(folder: Path) -> None:
    data = (folder / "student.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    draw = random.Random(0)
    everything = changes(header)
    refused = unnamed = 0
    for place, value in draw.sample(everything, 50):
        text = json.dumps(changed(header, place, value)).encode()
        size = draw.choice([len(text)] * 8 + [0, 2**63, len(text) + 1])
        _put(folder, "student.safetensors", size.to_bytes(8, "little") + text + body)
        try:
            load_bundle(folder, CPU)
        except BundleError as error:
            refused += bool(error.param)
            unnamed += not error.param
    assert refused > 20 and not unnamed


def test_a_changed_tokenizer_is_refused_or_reads_prompts() -> None:
    original = json.loads(pieces_file())
    draw = random.Random(0)
    everything = changes(original)
    read = 0
    for place, value in draw.sample(everything, min(1500, len(everything))):
        data = json.dumps(changed(original, place, value)).encode()
        try:
            tokenizer = read_tokenizer(data, TEXT, "tokenizer.json")
        except WeightsError:
            continue
        read += 1
        pieces = tokenizer.encode("a red cat and blue hearts " * 5).ids
        assert 0 < len(pieces) <= TEXT.length and max(pieces) < TEXT.vocabulary, place
    assert read


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(path.parent)  # the whole path may be too long for one
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_fifo, _socket, _device, Path.mkdir])
@pytest.mark.parametrize("file", ["student.safetensors", "manifest.json", "marginals.safetensors"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    folder: Path, file: str, make: Callable[[Path], None]
) -> None:
    (folder / file).unlink()
    make(folder / file)
    with pytest.raises(DDError, match=r"not a regular file|neither a folder with a manifest") as refused:
        load_bundle(folder, CPU)
    assert refused.value.message.count(str(folder)) <= 1, "a file that is named is named once"


def test_an_architecture_is_held_against_its_files_before_it_costs_anything(folder: Path) -> None:
    """32 times the width in a file of the old size: gigabytes, were they allocated."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["student"]["dim"] = manifest["teacher"]["dim"] = 16_384
    path.write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=r"student.safetensors: \d+ bytes, and the architecture has \d+"):
        load_bundle(folder, CPU)


def test_a_file_without_an_end_is_not_read_to_it(folder: Path) -> None:
    with (folder / "student.safetensors").open("r+b") as file:
        file.truncate(2**40)  # it takes no room
    with pytest.raises(BundleError, match="the manifest says"):
        load_bundle(folder, CPU)


def test_plans_of_an_absent_table_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["marginals.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="needs a marginal"):
        load_bundle(folder, CPU)
