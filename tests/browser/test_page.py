"""The page in a real browser, against a real server with a real (tiny) model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.tools import budget, expected, image_of, receipt_of, settled
from tests.server.helpers import Gate, Running, eventually, running


def test_class_budget_and_seed_give_the_image_the_plan_and_the_time(page: Page, server: Running) -> None:
    page.get_by_label("ship").check()
    page.get_by_label("Seed").fill("11")
    budget(page, 2)
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#facts")).to_contain_text("dd-2")
    settled(page)
    assert image_of(page) == expected(server, label="ship", seed=11, steps=2)
    assert page.locator("#facts dd").all_text_contents() == ["dd-2", "40.0"]
    assert re.search(r"2 passes\s*[\d.]+ m?s", page.locator("#trail [aria-current]").inner_text())
    assert "label=ship" in page.url
    assert "seed=11" in page.url


def test_compare_shows_every_quality_from_one_seed(page: Page, server: Running) -> None:
    page.goto("/?label=frog&seed=3&steps=1")
    settled(page)
    page.get_by_role("button", name="Compare").click()
    settled(page, 3)
    assert [image_of(page, i) for i in range(3)] == [
        expected(server, label="frog", seed=3, steps=steps) for steps in (1, 12, 64)
    ]
    assert [c.split("\n")[0] for c in page.locator("figcaption").all_inner_texts()] == [
        "1 pass",
        "12 passes",
        "64 passes",
    ]
    tops = [box["y"] for figure in page.locator("figure").all() if (box := figure.bounding_box())]
    assert len(tops) == 3
    assert len(set(tops)) == 1, "side by side"


def test_the_address_holds_the_state(page: Page, server: Running) -> None:
    page.goto("/?label=truck&seed=42&steps=12")
    settled(page)
    assert image_of(page) == expected(server, label="truck", seed=42, steps=12)
    assert page.get_by_label("Seed").input_value() == "42"
    assert "pre-trained-11-21" in (page.locator("#plan-note").text_content() or "")


def test_the_slider_reaches_every_budget_and_names_the_plan(page: Page) -> None:
    page.get_by_text("Numbers", exact=True).click()
    page.get_by_label("Step budget").focus()
    page.keyboard.press("End")
    expect(page.locator("#plan-note")).to_contain_text("teacher")
    page.keyboard.press("Home")
    expect(page.locator("#plan-note")).to_contain_text("dd-1")
    expect(page.locator("#steps-value")).to_have_text("1")


def tab_to(page: Page, selector: str) -> None:
    """Presses Tab until the focus is there, and sees to it that it can be seen."""
    focused = f"(document.activeElement ?? document.body).matches({json.dumps(selector)})"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(focused):
            outline = """() => {
              const focused = document.activeElement;
              const seen = focused.matches(".chips input") ? focused.nextElementSibling : focused;
              return getComputedStyle(seen.closest(".file") ?? seen).outlineStyle;
            }"""
            assert page.evaluate(outline) == "solid", selector
            return
    raise AssertionError(f"Tab never reaches {selector}")


def test_it_works_by_keyboard_alone(page: Page, server: Running) -> None:
    title, press = page.locator("#title"), page.keyboard.press
    tab_to(page, "input[name=label]")
    press("ArrowRight")
    expect(title).to_have_text("automobile, seed 7")
    tab_to(page, "#numbers summary")
    press("Enter")
    tab_to(page, "#steps")
    press("ArrowRight")
    expect(page.locator("#trail button")).to_have_count(2)
    tab_to(page, "#seed")
    press("ControlOrMeta+a")
    page.keyboard.type("5")
    press("Enter")
    expect(page.locator("#figures img")).to_have_attribute("alt", "automobile, seed 5, made in 2 passes")
    settled(page)
    assert image_of(page) == expected(server, label="automobile", seed=5, steps=2)
    tab_to(page, "#gallery")
    press("Enter")
    expect(page.locator("#tiles button:enabled")).to_have_count(8)
    settled(page)
    tab_to(page, "#file")
    tab_to(page, "#trail button")
    press("Enter")
    expect(page.locator("#figures img")).to_have_attribute("alt", "automobile, seed 5, made in 1 pass")
    tab_to(page, "#open")
    tab_to(page, "#keep")
    press("Home")
    expect(page.locator("#keep-value")).to_have_text("5%")
    press("Tab")
    press("Enter")
    expect(page.locator("#tray-title")).to_contain_text("5%")
    settled(page)
    tab_to(page, "#tiles button:nth-child(3)")
    press("Space")
    expect(title).to_have_text("automobile, seed 5, varied")
    tab_to(page, "#thumbs button")
    press("Enter")
    expect(title).to_have_text("automobile, seed 5")


def test_pixels_stay_pixels(page: Page) -> None:
    style = "getComputedStyle(document.querySelector('#figures img')).imageRendering"
    assert page.evaluate(style) == "pixelated"


def test_the_download_is_the_image(page: Page, tmp_path: Path) -> None:
    with page.expect_download() as caught:
        page.get_by_role("link", name="Download").click()
    caught.value.save_as(tmp_path / "image.png")
    assert (tmp_path / "image.png").read_bytes() == image_of(page)
    assert caught.value.suggested_filename.endswith(".png")


def test_the_permalink_and_the_command_give_the_image(page: Page, server: Running) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown = image_of(page)
    assert server.client.get(f"/images/{receipt_of(page)}").content == shown
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    command = page.evaluate("navigator.clipboard.readText()")
    body = json.loads(re.findall(r"-d '(.*)' > image.png$", command)[0])
    assert body == {"label": "airplane", "seed": 7, "steps": 1}
    assert command.startswith(f"curl -s {server.url}/generate -H 'accept: image/png'")
    assert expected(server, **body) == shown


def test_earlier_images_come_back(page: Page) -> None:
    first = image_of(page)
    page.get_by_role("button", name="Random").click()
    expect(page.locator("#thumbs button")).to_have_count(1)
    settled(page)
    assert image_of(page) != first
    page.locator("#thumbs button").click()
    assert image_of(page) == first
    assert page.get_by_label("Seed").input_value() == "7"


def test_the_live_strip_shows_the_last_minute(page: Page) -> None:
    for number in ("#live-p50", "#live-p99"):
        expect(page.locator(number)).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    expect(page.locator("#live-depth")).to_have_text("0")
    expect(page.locator("#live-rate")).to_have_text(re.compile(r"^\d+\.\d$"))
    assert re.match(r"[\d.]+,[\d.]+", page.locator("#live-curve").get_attribute("points") or "")


def test_the_live_strip_rests_while_the_tab_is_hidden(page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/metrics" in request.url else None)
    page.evaluate("""() => {
      Object.defineProperty(document, "hidden", { value: true, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }""")
    page.wait_for_timeout(3000)
    assert asked == []
    with page.expect_request("**/metrics"):
        page.evaluate("""() => {
          Object.defineProperty(document, "hidden", { value: false });
          document.dispatchEvent(new Event("visibilitychange"));
        }""")


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.get_by_role("button", name="Gallery").click()
    expect(page.locator("#tiles button:enabled")).to_have_count(8)
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Compare").click()
    settled(page, 3)
    page.get_by_label("From a picture").fill("x" * 99)
    page.get_by_role("button", name="Repeat").click()
    expect(page.get_by_role("alert")).to_be_in_viewport(ratio=0.95)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    expect(page.get_by_role("button", name="Draw")).to_be_in_viewport(ratio=0.95 if width < 800 else 0)
    page.goto("/docs")
    expect(page.locator("h2", has_text="/generate")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_a_phone_one_is_taken_to_what_one_draws(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    expect(page.locator("#figures")).not_to_be_in_viewport(ratio=0.95)
    page.get_by_role("button", name="Random").click()
    settled(page)
    assert page.evaluate("scrollY") == 0
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#figures")).to_be_in_viewport(ratio=0.95)
    settled(page)
    expect(page.locator("#figures")).to_be_in_viewport(ratio=0.95)


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
        ("--accent", "--card"),
        ("--soft", "--well"),
    ]
    assert {pair: contrast(page, *pair) for pair in pairs if contrast(page, *pair) < 4.5} == {}
    assert contrast(page, "--edge", "--card") >= 3, "where a field is"
    assert contrast(page, "--edge", "--well") >= 3
    assert contrast(page, "--accent", "--well") >= 3, "what has the focus, or is chosen"


def test_an_error_is_shown_in_the_servers_words(browser: Browser, bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, warmup=False) as live:
        tab = browser.new_page(base_url=live.url)
        tab.goto("/")
        settled(tab)
        gate.poisoned.value = 0
        tab.get_by_role("button", name="Draw").click()
        expect(tab.get_by_role("alert")).to_contain_text("the device failed on this request")
        gate.poisoned.value = -1
        tab.get_by_role("button", name="Draw").click()
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
    paths = ("/generate", "/images/{receipt}", "/models", "/v1/models", "/healthz", "/readyz", "/metrics")
    for path in paths:
        expect(page.locator("h2 code").get_by_text(path, exact=True)).to_have_count(1)
    expect(page.locator("th", has_text="prompt").first).to_be_visible()
    page.go_back()
    settled(page)


def test_the_field_for_a_key_is_shown_when_one_is_asked_for(
    browser: Browser, bundle_folder: Path, tmp_path: Path
) -> None:
    key, later = "first-key-0123456789", "later-key-0123456789"
    (tmp_path / "keys").write_text(key, encoding="ascii")
    with running(bundle_folder, api_keys_file=tmp_path / "keys", warmup=False) as live:
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
