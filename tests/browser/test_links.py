"""Links and the history: what an address asks for, what Back and a reload lead to."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from dd_core.noise import NoiseKey
from server.generation.receipts import Receipt
from tests.browser.tools import budget, expected, image_of, read_receipt_of, settled, tile_of, watched
from tests.server.helpers import Running


@pytest.mark.parametrize(
    ("query", "said", "field"),
    [
        ("label=zebra", "“zebra”, which tiny does not know. It knows airplane, ", "class-name"),
        ("label=10", "“10”, which tiny does not know", "class-name"),
        ("label=ship&model=huge", "“huge”, which is not loaded. Here: tiny.", "models"),
        ("prompt=a+cat", "“a cat”, and tiny draws from classes: airplane, ", "class-name"),
        ("label=ship&seed=-1", "“-1”; seeds are whole numbers from 0 to 2⁵³ − 1", "seed"),
        ("label=ship&seed=9007199254740992", "seeds are whole numbers", "seed"),
        ("label=ship&steps=65", "“65”; tiny takes 1 to 64", "steps"),
        ("label=ship&plan=best", "“best”, which tiny does not offer. It offers dd-1, dd-2, ", "plan"),
    ],
)
def test_a_link_that_cannot_be_followed_says_why(page: Page, query: str, said: str, field: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"/?{query}")
    expect(page.get_by_role("alert")).to_contain_text(said)
    expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    assert [url for url in asked if url.endswith("/generate")] == [], "no other picture in its place"
    page.get_by_role("button", name="Draw").click()
    settled(page)
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("label", ["SHIP", "8"])
def test_a_class_in_a_link_may_be_its_index_or_in_any_case(page: Page, server: Running, label: str) -> None:
    page.goto(f"/?label={label}&seed=2&steps=1")
    settled(page)
    expect(page.get_by_label("ship")).to_be_checked()
    assert image_of(page) == expected(server, label="ship", seed=2, steps=1)


def test_back_and_forward_lead_to_what_was_shown(page: Page, server: Running) -> None:
    page.get_by_label("frog").check()
    expect(page.locator("#title")).to_have_text("frog, seed 7")
    settled(page)
    page.get_by_role("button", name="Compare").click()
    settled(page, 3)
    page.go_back()
    settled(page)
    assert image_of(page) == expected(server, label="frog", seed=7, steps=1)
    page.go_back()
    expect(page.locator("#title")).to_have_text("airplane, seed 7")
    settled(page)
    expect(page.get_by_label("airplane")).to_be_checked()
    assert image_of(page) == expected(server, label="airplane", seed=7, steps=1)
    page.go_forward()
    expect(page.locator("#title")).to_have_text("frog, seed 7")
    page.go_forward()
    settled(page, 3)
    page.reload()
    settled(page, 3)
    page.go_back()
    settled(page)
    expect(page.locator("#title")).to_have_text("frog, seed 7")


def test_earlier_pictures_outlive_a_reload(page: Page) -> None:
    first = image_of(page)
    page.get_by_role("button", name="Random").click()
    expect(page.locator("#thumbs button")).to_have_count(1)
    settled(page)
    page.reload()
    settled(page)
    expect(page.locator("#thumbs button")).to_have_count(1)
    page.locator("#thumbs button").click()
    assert image_of(page) == first
    expect(page.locator("#title")).to_have_text("airplane, seed 7")


def drawn_gallery(page: Page) -> list[bytes]:
    """Three pictures of one seed."""
    page.get_by_label("Gallery size").fill("3")
    page.get_by_role("button", name="Gallery").click()
    expect(page.locator("#tiles img[src]")).to_have_count(3)
    settled(page)
    return [tile_of(page, i) for i in range(3)]


def test_a_gallery_outlives_a_reload_and_ends_with_its_model(page: Page) -> None:
    before = drawn_gallery(page)
    page.locator("#tiles button").nth(1).click()
    page.reload()
    settled(page)
    expect(page.locator("#tray-title")).to_have_text("3 pictures of airplane, seed 7")
    assert [tile_of(page, i) for i in range(3)] == before
    assert image_of(page) == before[1]
    expect(page.locator("#tiles button").nth(1)).to_have_attribute("aria-pressed", "true")
    page.locator("#tiles button").nth(2).click()
    assert image_of(page) == before[2]
    kept = page.evaluate(
        """async () => {
          const { saveTray, savedTray } = await import("/static/recent.js");
          const model = (await (await fetch("/models")).json()).models[0];
          const stage = (size) => ({ plan: "dd-1", image: { data: "x".repeat(size) } });
          const picture = (size) => ({ model, source: {}, stages: [stage(size)] });
          const read = () => savedTray([model])[1].length;
          saveTray("two", [picture(10), picture(10)]);
          const here = [read(), savedTray([{ ...model, name: "other" }])[1].length];
          saveTray("too much", [picture(2_000_000)]);
          return [...here, read()];
        }"""
    )
    assert kept == [2, 0, 0]


def test_a_gallery_outlives_a_reload_that_is_refused(page: Page) -> None:
    """At the first, the server is full; and it is there at the second."""
    before = drawn_gallery(page)
    full = {"error": {"type": "rate_limit_error", "code": "queue_full", "message": "full", "param": None}}
    page.route("**/generate", lambda route: route.fulfill(status=429, json=full))
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("full")
    expect(page.locator("#tiles img[src]")).to_have_count(3)
    page.unroute("**/generate")
    page.reload()
    settled(page)
    assert [tile_of(page, i) for i in range(3)] == before


def test_the_history_is_bounded(page: Page) -> None:
    kept = page.evaluate(
        """async () => {
          const { save, saved, KEPT } = await import("/static/recent.js");
          const model = (await (await fetch("/models")).json()).models[0];
          const image = (n, size) => ({ receipt: `dd1.${n}`, data: "x".repeat(size) });
          const stage = (n, size) => ({ plan: "dd-1", image: image(n, size) });
          for (let n = 0; n < 30; n++) save({ model, source: {}, stages: [stage(n, 10)] });
          const many = saved([model]).map(({ stage }) => stage.image.receipt);
          for (let n = 0; n < 5; n++) save({ model, source: {}, stages: [stage(`big${n}`, 900_000)] });
          const big = saved([model]).map(({ stage }) => stage.image.receipt);
          return [KEPT, many, big, saved([{ ...model, name: "other" }]).length];
        }"""
    )
    assert kept == [
        18,
        [f"dd1.{n}" for n in range(29, 11, -1)],
        ["dd1.big4", "dd1.big3"],
        0,
    ]


def test_an_exact_plan_is_sent_by_its_name(page: Page) -> None:
    page.get_by_text("Numbers", exact=True).click()
    with page.expect_request("**/generate") as caught:
        page.get_by_label("Plan", exact=True).select_option("teacher")
    assert caught.value.post_data_json == {"label": "airplane", "seed": 7, "plan": "teacher"}
    settled(page)
    assert read_receipt_of(page).plan == "teacher"
    assert "plan=teacher" in page.url
    assert "steps" not in page.url
    page.reload()
    settled(page)
    expect(page.locator("#plan")).to_have_value("teacher")
    assert read_receipt_of(page).plan == "teacher"
    with page.expect_request("**/generate") as caught:
        budget(page, 1)
    assert caught.value.post_data_json == {"label": "airplane", "seed": 7, "steps": 1}
    settled(page)


def test_words_for_quality_are_what_the_server_measured(page: Page, server: Running) -> None:
    [model] = server.client.get("/models").json()["models"]
    grades = page.get_by_role("group", name="Quality").get_by_role("button")
    expect(grades).to_have_text(["Fast", "Better", "Best"])
    for word, quality in (("Best", "high"), ("Better", "medium"), ("Fast", "low")):
        page.get_by_role("button", name=word, exact=True).click()
        expect(page.get_by_role("button", name=word, exact=True)).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#facts")).to_contain_text(f"plan{model['qualities'][quality]}")
        settled(page)
        assert read_receipt_of(page).plan == model["qualities"][quality]


def test_the_page_says_what_the_model_knows(page: Page) -> None:
    expect(page.locator("#knows")).to_have_text(re.compile("^Random weights for tests.*32×32 pixels"))


def test_a_seed_beyond_javascripts_numbers_is_never_rounded(browser: Browser, server: Running) -> None:
    receipt = server.post({"label": "ship", "seed": str(2**63 - 1), "steps": 1}).json()["images"][0][
        "receipt"
    ]
    with watched(browser, server.url) as tab:
        tab.goto(f"/?receipt={receipt}")
        settled(tab)
        expect(tab.locator("#title")).to_have_text("ship, seed 9223372036854775807")
        name = tab.get_by_role("link", name="Download", exact=True).get_attribute("download")
        assert name == "ship-seed-9223372036854775807-dd-1.png"


def test_numbers_within_a_prompt_stay_the_prompts(page: Page) -> None:
    text = 'a "[1,9007199254740993]" \\ 12345678901234567890'
    receipt = str(Receipt.of("words", "0" * 16, text, "dd-1", NoiseKey(2**53 + 1, 3)))
    read = page.evaluate(
        """async (receipt) => (await import("/static/receipts.js")).readReceipt(receipt)""", receipt
    )
    assert (read["condition"], read["seed"], read["number"]) == (text, str(2**53 + 1), 3)
