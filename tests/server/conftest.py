"""One tiny bundle for all tests here, and one server for those that do not disturb it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dd_core.bundle import Bundle, load_bundle
from tests.hub_fixtures import hub as hub
from tests.server.harness import Running, running
from tests.tiny import tiny_bundle


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder, torch.device("cpu"))


@pytest.fixture(scope="session")
def server(bundle: Bundle) -> Iterator[Running]:
    with running(bundle) as live:
        yield live
