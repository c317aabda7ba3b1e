"""The same server as the HTTP tests use, and a browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.tools import settled, watched
from tests.conftest import CHROMIUM
from tests.server.conftest import bundle, bundle_folder, gate, manager, server, text_folder
from tests.server.helpers import Running

__all__ = ["bundle", "bundle_folder", "gate", "manager", "server", "text_folder"]

expect.set_options(timeout=30_000)
# Without these flags Chromium asks its vendor's hosts at every start.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")  # its event loop runs in this thread: other modules need theirs
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """The page, open and with its first image; no error in its console, nothing loaded from elsewhere."""
    with watched(browser, server.url) as tab:
        tab.goto("/?label=airplane&seed=7&steps=1")
        settled(tab)
        yield tab
