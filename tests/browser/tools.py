"""What the tests of the page ask of it again and again."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect

from server.generation.receipts import Receipt, parse_receipt
from tests.server.helpers import Running


@contextmanager
def watched(browser: Browser, url: str, **context: object) -> Iterator[Page]:
    """A tab that must log no error and load nothing from elsewhere."""
    own = browser.new_context(
        base_url=url,
        **{"viewport": {"width": 1200, "height": 860}, **context},  # type: ignore[arg-type]
    )
    tab = own.new_page()
    problems: list[str] = []
    refused = "Failed to load resource: the server responded with a status of 4"  # for the page to show

    def note(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith(refused):
            problems.append(message.text)

    tab.on("console", note)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith((url, "data:")) else problems.append(r.url))
    yield tab
    # A request that is being answered by a test would fail in the next one, which uses the same browser.
    tab.unroute_all(behavior="ignoreErrors")
    own.close()
    assert problems == [], problems


def source_of(image: Locator) -> bytes:
    """The file that an image shows."""
    return base64.b64decode((image.get_attribute("src") or "").partition("base64,")[2])


def image_of(page: Page, index: int = 0) -> bytes:
    """The large image, or one of those side by side."""
    return source_of(page.locator("#figures img").nth(index))


def tile_of(page: Page, index: int) -> bytes:
    """One of the gallery's or of the variations."""
    return source_of(page.locator("#tiles img").nth(index))


def settled(page: Page, images: int = 1) -> None:
    """Waits until nothing is being drawn."""
    expect(page.locator("#figures img")).to_have_count(images)
    expect(page.locator("#figures")).not_to_have_attribute("aria-busy", "true")


def budget(page: Page, steps: int) -> None:
    """Presses a step budget, behind the disclosure of the numbers."""
    page.locator("#numbers").evaluate("(details) => { details.open = true; }")
    page.locator("#stops").get_by_role("button", name=str(steps), exact=True).click()


def expected(server: Running, **body: object) -> bytes:
    """What the server gives for a body."""
    return server.post(body, accept="image/png").raise_for_status().content


def receipt_of(page: Page) -> str:
    """The receipt of the image that is shown, from the link that opens it."""
    href = page.get_by_role("link", name="Open").get_attribute("href") or ""
    return href.removeprefix("images/")


def read_receipt_of(page: Page) -> Receipt:
    """The same, read."""
    return parse_receipt(receipt_of(page))


def drop(page: Page, file: bytes, name: str) -> None:
    """Drops a file on the page."""
    transfer = page.evaluate_handle(
        """([bytes, name]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
          return transfer;
        }""",
        [base64.b64encode(file).decode(), name],
    )
    page.locator("main").dispatch_event("drop", {"dataTransfer": transfer})
