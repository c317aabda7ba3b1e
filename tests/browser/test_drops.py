"""What is dragged over the page: files and receipts, wherever they are let go."""

from __future__ import annotations

import base64

import pytest
from playwright.sync_api import JSHandle, Page, expect

from tests.browser.tools import expected, image_of, receipt_of, settled
from tests.server.helpers import Running

OVERLAY = "() => getComputedStyle(document.body, '::after').content"


def transfer_of(page: Page, file: bytes) -> JSHandle:
    return page.evaluate_handle(
        """(bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], "saved.png"));
          return transfer;
        }""",
        base64.b64encode(file).decode(),
    )


@pytest.mark.parametrize("where", ["header", "#figures", "#receipt", "#again", "html"])
def test_a_file_may_be_dropped_anywhere_and_the_page_says_so(page: Page, server: Running, where: str) -> None:
    file = expected(server, label="truck", seed=9, steps=2)
    data = {"dataTransfer": transfer_of(page, file)}
    assert page.evaluate(OVERLAY) == "none"
    target = page.locator(where)
    target.dispatch_event("dragover", data)
    assert "receipt is read" in page.evaluate(OVERLAY)
    through = page.evaluate("() => getComputedStyle(document.body, '::after').pointerEvents")
    assert through == "none", "what is dropped falls through"
    target.dispatch_event("drop", data)
    assert page.evaluate(OVERLAY) == "none"
    expect(page.locator("#title")).to_have_text("truck, seed 9")
    settled(page)
    assert image_of(page) == file


def test_the_page_says_nothing_any_more_once_a_file_has_left_it(page: Page) -> None:
    data = {"dataTransfer": transfer_of(page, b"")}
    page.locator("main").dispatch_event("dragover", data)
    page.locator("main").dispatch_event("dragleave", data)  # to nowhere: out of the window
    assert page.evaluate(OVERLAY) == "none"


def test_a_text_that_goes_into_a_field_is_left_to_the_browser(page: Page) -> None:
    """A receipt that is dropped elsewhere is repeated."""
    receipt, shown = receipt_of(page), image_of(page)
    page.get_by_role("button", name="Random").click()
    settled(page)
    text = page.evaluate_handle(
        "(text) => { const t = new DataTransfer(); t.setData('text/plain', text); return t; }", receipt
    )
    page.locator("main").dispatch_event("dragover", {"dataTransfer": text})
    assert "receipt is read" in page.evaluate(OVERLAY), "on its way to the field"
    page.locator("#seed").dispatch_event("dragover", {"dataTransfer": text})
    assert page.evaluate(OVERLAY) == "none"
    page.locator("main").dispatch_event("drop", {"dataTransfer": text})
    expect(page.locator("#title")).to_have_text("airplane, seed 7")
    settled(page)
    assert image_of(page) == shown
