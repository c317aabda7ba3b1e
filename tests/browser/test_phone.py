"""The pages on a phone, 390 pixels wide."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.tools import settled, watched
from tests.server.helpers import Running

# What can be touched, and is smaller than 44 pixels either way. A file or a radio is touched by its label;
# links in running text are as high as their line.
TOO_SMALL = """() => {
  const targets = new Set();
  const all = "button, summary, nav a, .brand, .button, input, select, textarea";
  for (const each of document.querySelectorAll(all)) {
    targets.add(each.matches("[type=file], [type=radio], [type=checkbox]") ? each.closest("label") : each);
  }
  const found = [];
  for (const target of targets) {
    const { width, height } = target.getBoundingClientRect();
    if (!target.checkVisibility({ visibilityProperty: true }) || !width) continue;
    const name = target.id || target.textContent.trim() || target.outerHTML;
    if (width < 44 || height < 44) found.push(`${name}: ${width} × ${height}`);
  }
  return [targets.size, found];
}"""


@pytest.fixture
def phone(browser: Browser, server: Running) -> Iterator[Page]:
    with watched(browser, server.url, viewport={"width": 390, "height": 844}, has_touch=True) as tab:
        yield tab


def check(phone: Page, least: int) -> None:
    """Check all targets, of which there are at least so many, and that nothing is wider than the screen."""
    count, found = phone.evaluate(TOO_SMALL)
    assert count >= least
    assert found == []
    assert phone.evaluate("document.documentElement.scrollWidth") == 390


def test_targets_of_the_playground_are_large_enough(phone: Page) -> None:
    """With a gallery and earlier pictures, side by side; every disclosure open, and a key asked for."""
    phone.goto("/?label=airplane&seed=7&steps=1")
    settled(phone)
    phone.get_by_role("button", name="Gallery").tap()
    expect(phone.locator("#tiles img[src]")).to_have_count(8)
    settled(phone)
    phone.get_by_role("button", name="Random").tap()
    expect(phone.locator("#thumbs button")).to_have_count(1)
    settled(phone)
    phone.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    phone.evaluate("document.querySelector('#key-form').hidden = false")
    check(phone, 40)
    phone.get_by_role("button", name="Compare").tap()
    settled(phone, 3)
    check(phone, 40)


@pytest.mark.parametrize(("path", "least"), [("models.html", 4), ("metrics.html", 4), ("docs", 10)])
def test_targets_of_the_other_pages_are_large_enough(phone: Page, path: str, least: int) -> None:
    phone.goto(f"/{path}")
    expect(phone.locator("main h2").first).to_be_visible()
    phone.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    check(phone, least)


def test_the_first_screen_has_the_choice_and_the_button(phone: Page) -> None:
    phone.goto("/?label=airplane&seed=7&steps=1")
    settled(phone)
    phone.evaluate("scrollTo(0, 0)")
    for target in (phone.get_by_text("ship", exact=True), phone.get_by_role("button", name="Draw")):
        box = target.bounding_box()
        assert box is not None and box["y"] + box["height"] <= 844
