"""One tiny bundle for all tests of the core."""

from __future__ import annotations

from collections.abc import Iterator
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


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Of torch, where one is the rule: how work is shared out may change its rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
