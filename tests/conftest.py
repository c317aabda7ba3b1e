"""What every test shares: a folder names its marker, long tests come first, torch keeps to one thread.

One thread makes results repeatable and, on models this small, costs no time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FOLDERS = ("gpu", "browser", "slow")
# Their files take longest. Where processes share the files, one that came last would keep the others waiting.
FIRST = ("slow", "training", "benchmarks", "browser")
# The shell first: it draws no windows, which is a fifth of the work.
_BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, _BROWSERS)), None)

torch.set_num_threads(1)


def _folder_of(item: pytest.Item) -> str:
    return item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by the first folder under tests/, and skips what this machine cannot run."""
    items.sort(key=lambda item: FIRST.index(_folder_of(item)) if _folder_of(item) in FIRST else len(FIRST))
    no_gpu = pytest.mark.skip(reason="no CUDA device on this machine")
    no_browser = pytest.mark.skip(reason="no Chromium on this machine (`make browser` installs Debian's)")
    has_gpu = torch.cuda.is_available()
    for item in items:
        folder = _folder_of(item)
        if folder in FOLDERS:
            item.add_marker(folder)
        if folder == "gpu" and not has_gpu:
            item.add_marker(no_gpu)
        if folder == "browser" and CHROMIUM is None:
            item.add_marker(no_browser)


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs that servers of other days kept decide nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DD_HOME", str(tmp_path_factory.mktemp("home")))
        yield
