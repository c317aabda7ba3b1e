"""Models as they are found for a server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dd_core.errors import BundleNotFoundError, InvalidRequestError
from server.models.catalog import find, find_all


def test_two_models_of_one_name_are_refused(bundle_folder: Path, tmp_path: Path) -> None:
    """Once the second took the place of the first without a word."""
    other = tmp_path / "mine"
    shutil.copytree(bundle_folder, other)
    with pytest.raises(InvalidRequestError, match="two models are called tiny") as caught:
        find_all([str(bundle_folder), f" {other}"])
    assert str(bundle_folder) in caught.value.message and str(other) in caught.value.message
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "name": "mine"}))
    assert [model.name for model in find_all([str(bundle_folder), str(other)])] == ["tiny", "mine"]


@pytest.mark.parametrize("source", ["", "x" * 5000, "a/" * 5000, "\0"])
def test_a_source_that_can_be_none_is_refused_as_one(
    source: str, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one was the working directory, and a long one an error of the system."""
    monkeypatch.chdir(bundle_folder)
    with pytest.raises(BundleNotFoundError) as caught:
        find(source)
    assert len(caught.value.message) < 600
