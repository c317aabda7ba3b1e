"""One tiny bundle for all tests here, and one server for those that do not disturb it."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path

import pytest
import torch

from dd_core.bundle import Bundle, load_bundle
from tests.hub_fixtures import hub as hub
from tests.server.helpers import Gate, Running, processes, running
from tests.tiny import tiny_bundle
from tests.tiny_text import tiny_text_bundle


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_bundle(tmp_path_factory.mktemp("text") / "tiny-text")


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder, torch.device("cpu"))


@pytest.fixture(scope="session")
def manager() -> Iterator[SyncManager]:
    """Lists that processes share."""
    with processes.Manager() as manager:
        yield manager


@pytest.fixture
def gate(manager: SyncManager) -> Gate:
    """A gate before a server's device, open."""
    return Gate(calls=manager.list())


@pytest.fixture(scope="session")
def server(bundle_folder: Path) -> Iterator[Running]:
    with running(bundle_folder) as live:
        yield live
