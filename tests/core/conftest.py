"""One tiny bundle for all tests of the core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dd_core.bundle import Bundle, load_bundle
from tests.hub_fixtures import hub as hub
from tests.tiny import tiny_bundle


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder, torch.device("cpu"))
