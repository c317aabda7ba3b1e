"""The page in a real browser, against a real server with a real (tiny) model."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server.harness import Gate, Running, eventually, running

expect.set_options(timeout=30_000)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
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
    context = browser.new_context(base_url=server.url, viewport={"width": 1200, "height": 860})
    tab = context.new_page()
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else problems.append(r.url))
    tab.goto("/")
    expect(tab.locator("#figures img")).to_have_count(1)
    yield tab
    context.close()
    assert problems == []


def image_of(page: Page, index: int = 0) -> bytes:
    source = page.locator("#figures img").nth(index).get_attribute("src") or ""
    return base64.b64decode(source.partition("base64,")[2])


def settled(page: Page, images: int = 1) -> None:
    expect(page.locator("#figures")).not_to_have_attribute("aria-busy", "true")
    expect(page.locator("#figures img")).to_have_count(images)


def expected(server: Running, label: str, seed: int, steps: int) -> bytes:
    body = {"label": label, "seed": seed, "steps": steps}
    return server.post(body, accept="image/png").raise_for_status().content


def test_class_budget_and_seed_give_the_image_the_plan_and_the_time(page: Page, server: Running) -> None:
    page.get_by_label("ship").check()
    page.get_by_label("Seed").fill("11")
    page.get_by_role("button", name="2", exact=True).click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("figcaption")).to_contain_text("dd-2")
    settled(page)
    assert image_of(page) == expected(server, "ship", 11, 2)
    caption = page.locator("figcaption").inner_text()
    assert "2 passes" in caption
    assert re.search(r"\d ms|\d s", caption)
    assert "label=ship" in page.url
    assert "seed=11" in page.url


def test_compare_shows_one_step_two_steps_and_the_teacher_from_one_seed(page: Page, server: Running) -> None:
    page.goto("/?label=frog&seed=3&steps=1")
    settled(page)
    page.get_by_role("button", name="Compare").click()
    settled(page, 3)
    assert [image_of(page, i) for i in range(3)] == [
        expected(server, "frog", 3, steps) for steps in (1, 2, 64)
    ]
    assert [c.split("\n")[0] for c in page.locator("figcaption").all_inner_texts()] == [
        "1 pass",
        "2 passes",
        "64 passes",
    ]
    tops = [box["y"] for figure in page.locator("figure").all() if (box := figure.bounding_box())]
    assert len(tops) == 3
    assert len(set(tops)) == 1, "side by side"


def test_the_address_holds_the_state(page: Page, server: Running) -> None:
    page.goto("/?label=truck&seed=42&steps=12")
    settled(page)
    assert image_of(page) == expected(server, "truck", 42, 12)
    assert page.get_by_label("Seed").input_value() == "42"
    assert page.locator("#plan-note").inner_text().count("pre-trained-11-21") == 1


def test_the_slider_reaches_every_budget_and_names_the_plan(page: Page) -> None:
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("End")
    expect(page.locator("#plan-note")).to_contain_text("teacher")
    page.keyboard.press("Home")
    expect(page.locator("#plan-note")).to_contain_text("dd-1")
    expect(page.locator("#steps-value")).to_have_text("1")


def test_it_works_by_keyboard_alone(page: Page, server: Running) -> None:
    page.get_by_label("airplane").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_label("Seed").focus()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    expect(page.locator("#figures img")).to_have_attribute("alt", "automobile, seed 5, made in 1 pass")
    settled(page)
    assert image_of(page) == expected(server, "automobile", 5, 1)


def test_pixels_stay_pixels(page: Page) -> None:
    style = "getComputedStyle(document.querySelector('#figures img')).imageRendering"
    assert page.evaluate(style) == "pixelated"


def test_the_download_is_the_image(page: Page, tmp_path: Path) -> None:
    with page.expect_download() as caught:
        page.get_by_role("link", name="Download").click()
    caught.value.save_as(tmp_path / "image.png")
    assert (tmp_path / "image.png").read_bytes() == image_of(page)
    assert caught.value.suggested_filename.endswith(".png")


def test_earlier_images_come_back(page: Page) -> None:
    first = image_of(page)
    page.get_by_role("button", name="Random").click()
    expect(page.locator("#thumbs button")).to_have_count(2)
    assert image_of(page) != first
    page.locator("#thumbs button").nth(1).click()
    settled(page)
    assert image_of(page) == first


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.get_by_role("button", name="Compare").click()
    settled(page, 3)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.goto("/docs")
    expect(page.locator("h2", has_text="/generate")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def contrast(page: Page, first: str, second: str) -> float:
    """WCAG contrast of two custom properties."""

    def luminance(name: str) -> float:
        colour = page.evaluate(
            f"getComputedStyle(document.documentElement).getPropertyValue('{name}')"
        ).strip()[1:]
        digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_readable(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    pairs = [("--ink", "--paper"), ("--ink", "--card"), ("--soft", "--card"), ("--soft", "--paper")]
    pairs += [
        ("--ink", "--well"),
        ("--accent-ink", "--accent"),
        ("--bad", "--bad-soft"),
        ("--ink", "--accent-soft"),
    ]
    assert {pair: contrast(page, *pair) for pair in pairs if contrast(page, *pair) < 4.5} == {}


def test_an_error_is_shown_in_the_servers_words(browser: Browser, bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate) as live:
        tab = browser.new_page(base_url=live.url)
        tab.goto("/")
        settled(tab)
        gate.poisoned.value = 0
        tab.get_by_role("button", name="Generate").click()
        expect(tab.get_by_role("alert")).to_contain_text("the device failed on this request")
        gate.poisoned.value = -1
        tab.get_by_role("button", name="Generate").click()
        settled(tab)
        expect(tab.get_by_role("alert")).to_be_hidden()
        tab.close()


def test_the_page_waits_for_warm_up(browser: Browser, bundle_folder: Path, gate: Gate) -> None:
    gate.open.clear()
    with running(bundle_folder, gate, ready=False) as live:
        tab = browser.new_page(base_url=live.url)
        tab.goto("/")
        expect(tab.locator("#model-text")).to_contain_text("warming up")
        gate.open.set()
        eventually(lambda: live.client.get("/readyz").status_code == 200, "ready")
        settled(tab)
        expect(tab.locator("#model-text")).to_contain_text("tiny")
        tab.close()


def test_the_interface_is_described_without_outside_resources(page: Page) -> None:
    page.goto("/docs")
    expect(page.get_by_role("heading", name="Distilled Decoding API")).to_be_visible()
    for path in ("/generate", "/models", "/healthz", "/readyz", "/metrics"):
        expect(page.locator("h2", has_text=path)).to_have_count(1)
    expect(page.locator("th", has_text="prompt")).to_be_visible()
    page.go_back()
    settled(page)


def test_the_field_for_a_key_is_shown_when_one_is_asked_for(
    browser: Browser, bundle_folder: Path, tmp_path: Path
) -> None:
    key, later = "first-key-0123456789", "later-key-0123456789"
    (tmp_path / "keys").write_text(key, encoding="ascii")
    with running(bundle_folder, api_keys_file=tmp_path / "keys") as live:
        tab = browser.new_page(base_url=live.url)
        tab.goto("/")
        field = tab.get_by_label("API key")
        expect(field).to_be_focused()
        expect(tab.locator("#key-note")).to_contain_text("asks for a key")
        field.fill("not-the-key-0123456789")
        field.press("Enter")
        expect(tab.locator("#key-note")).to_contain_text("does not know this key")
        field.fill(key)
        tab.get_by_role("button", name="Use").click()
        settled(tab)
        expect(field).to_be_hidden()
        tab.reload()
        settled(tab)
        expect(field).to_be_hidden()
        assert key not in tab.content()
        (tmp_path / "keys").write_text(later, encoding="ascii")
        eventually(
            lambda: live.client.get("/models", headers={"x-api-key": later}).status_code == 200,
            "the server reads its keys again",
        )
        tab.get_by_role("button", name="Random").click()
        expect(field).to_be_visible()
        field.fill(later)
        field.press("Enter")
        settled(tab)
        tab.close()


def test_no_field_for_a_key_where_none_is_needed(page: Page) -> None:
    expect(page.get_by_label("API key")).to_be_hidden()
