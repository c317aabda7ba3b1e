"""Pictures that are refined in place: streams, galleries, prompts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing.managers import SyncManager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from dd_core.noise import NoiseKey
from server.generation.receipts import Receipt
from tests.browser.tools import (
    budget,
    expected,
    image_of,
    read_receipt_of,
    receipt_of,
    settled,
    tile_of,
    watched,
)
from tests.server.helpers import Gate, Running, Turnstile, eventually, running


@pytest.fixture(scope="module")
def turnstile() -> Turnstile:
    return Turnstile()


@pytest.fixture(scope="module")
def held(bundle_folder: Path, turnstile: Turnstile, manager: SyncManager) -> Iterator[tuple[Running, Gate]]:
    """A server whose student makes only as many passes as it is let."""
    gate = Gate(open=turnstile, calls=manager.list())
    turnstile.set()
    with running(bundle_folder, gate, warmup=False) as live:
        yield live, gate
        turnstile.set()


@pytest.fixture
def stopped(
    browser: Browser, held: tuple[Running, Gate], turnstile: Turnstile
) -> Iterator[tuple[Page, Running, Gate]]:
    """The page, asking for a picture of 12 passes at a server that makes none yet."""
    live, gate = held
    turnstile.clear()
    with watched(browser, live.url) as tab:
        tab.goto("/?label=ship&seed=11&steps=12")
        yield tab, live, gate
        gate.poisoned.value = -1
        turnstile.set()


def height(page: Page) -> list[float]:
    boxes = [page.locator(selector).bounding_box() for selector in ("#sheet", "#form")]
    return [round(box["y"] + box["height"]) for box in boxes if box]


def test_the_first_picture_is_there_before_the_next_is_computed(
    stopped: tuple[Page, Running, Gate], turnstile: Turnstile
) -> None:
    tab, live, _ = stopped
    tab.set_viewport_size({"width": 360, "height": 740})  # where what comes could move what is there
    trail, image = tab.locator("#trail button"), tab.locator("#figures img")
    expect(trail).to_have_text(["1 pass…", "2 passes…", "12 passes…"])
    before = height(tab)
    turnstile.admit()
    expect(image).to_have_attribute("alt", "ship, seed 11, made in 1 pass")
    expect(tab.locator("#status")).to_contain_text("being refined")
    expect(tab.locator("#figures")).to_have_attribute("aria-busy", "true")
    expect(trail.nth(0)).to_have_attribute("aria-current", "step")
    expect(trail.nth(1)).to_be_disabled()
    pictures = [image_of(tab)]
    element = image.element_handle()
    turnstile.admit()
    expect(image).to_have_attribute("alt", "ship, seed 11, made in 2 passes")
    pictures.append(image_of(tab))
    turnstile.set()
    settled(tab)
    pictures.append(image_of(tab))
    assert tab.evaluate("(image) => image.isConnected", element), "replaced in place"
    assert height(tab) == before, "nothing moved"
    assert pictures == [expected(live, label="ship", seed=11, steps=steps) for steps in (1, 2, 12)]
    expect(trail.nth(2)).to_have_attribute("aria-current", "step")
    shown = [text.split()[-2:] for text in trail.locator(".time").all_inner_texts()]
    times = [float(number) * {"ms": 1, "s": 1000}[unit] for number, unit in shown]
    assert all(first < then for first, then in pairwise(times)), times

    trail.nth(0).click()
    assert image_of(tab) == pictures[0]
    assert expected(live, receipt=receipt_of(tab)) == pictures[0]
    tab.reload()
    settled(tab)
    assert image_of(tab) == pictures[0], "the address leads back to the stage"


def test_what_is_left_behind_is_not_computed(
    stopped: tuple[Page, Running, Gate], turnstile: Turnstile
) -> None:
    tab, live, _ = stopped
    canceled = live.metric("dd_requests_total", model="tiny", plan="pre-trained-11-21", outcome="canceled")
    expect(tab.locator("#trail button")).to_have_count(3)
    tab.get_by_label("frog").check()
    eventually(
        lambda: (
            live.metric("dd_requests_total", model="tiny", plan="pre-trained-11-21", outcome="canceled")
            == canceled + 1
        ),
        "the server notices",
    )
    turnstile.set()
    settled(tab)
    assert image_of(tab) == expected(live, label="frog", seed=11, steps=12)
    expect(tab.get_by_role("alert")).to_be_hidden()


def test_a_run_that_ends_leaves_the_address_to_what_is_shown(
    stopped: tuple[Page, Running, Gate], turnstile: Turnstile
) -> None:
    """Somebody went back while the picture was refined."""
    tab, live, _ = stopped
    turnstile.set()
    settled(tab)
    turnstile.clear()
    tab.get_by_label("frog").check()
    turnstile.admit()
    expect(tab.locator("#figures img")).to_have_attribute("alt", "frog, seed 11, made in 1 pass")
    tab.go_back()
    expect(tab.locator("#title")).to_have_text("ship, seed 11")
    turnstile.set()
    settled(tab)
    expect(tab.locator("#title")).to_have_text("ship, seed 11")
    assert "label=ship" in tab.url
    tab.go_forward()
    expect(tab.locator("#title")).to_have_text("frog, seed 11")
    settled(tab)
    assert image_of(tab) == expected(live, label="frog", seed=11, steps=12)


def test_an_error_on_the_way_leaves_the_picture_that_came(
    stopped: tuple[Page, Running, Gate], turnstile: Turnstile
) -> None:
    tab, live, gate = stopped
    turnstile.admit()
    expect(tab.locator("#figures img")).to_have_attribute("alt", "ship, seed 11, made in 1 pass")
    gate.poisoned.value = 8
    turnstile.set()
    expect(tab.get_by_role("alert")).to_contain_text("the device failed on this request")
    expect(tab.locator("#trail button")).to_have_count(1)
    gate.poisoned.value = -1
    settled(tab)
    assert image_of(tab) == expected(live, label="ship", seed=11, steps=1)


def event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def answered(server: Running, **changes: object) -> str:
    """A stream of one picture, as if the server had said more about it."""
    reply = server.post({"label": 2, "seed": 4}).raise_for_status().json()
    [image] = reply.pop("images")
    image["receipt"] = changes.pop("receipt", image["receipt"])
    return event("image", {**reply, "image": image, "stage": 0, "final": True, **changes}) + event("done", {})


def test_a_busy_servers_cheaper_plan_is_named(page: Page, server: Running) -> None:
    body = answered(server, requested_plan="teacher")
    page.route("**/generate", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    budget(page, 64)
    expect(page.locator("#busy-note")).to_have_text(
        "The server is busy: it drew dd-1 (1 pass) instead of teacher."
    )
    expect(page.locator("#trail button")).to_have_count(1)


def test_a_stream_that_breaks_off_is_an_error(page: Page, server: Running) -> None:
    body = answered(server, final=False).partition("event: done")[0]
    page.route("**/generate", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("alert")).to_contain_text("connection ended")
    expect(page.locator("#figures")).not_to_have_attribute("aria-busy", "true")


def test_a_gallery_is_refined_in_place_and_picked_from(page: Page, server: Running) -> None:
    page.goto("/?label=dog&seed=5&steps=2")
    settled(page)
    page.get_by_role("button", name="Gallery").click()
    settled(page)
    expect(page.locator("#tiles img[src]")).to_have_count(8)
    reply = server.post({"label": "dog", "seed": 5, "steps": 2, "n": 8}).raise_for_status().json()
    assert [tile_of(page, i) for i in range(8)] == [base64.b64decode(i["data"]) for i in reply["images"]]
    expect(page.locator("#tiles button").nth(0)).to_have_attribute("aria-pressed", "true")
    page.locator("#tiles button").nth(5).click()
    expect(page.locator("#title")).to_have_text("dog, seed 5, image 5")
    expect(page.locator("#tiles button").nth(5)).to_have_attribute("aria-pressed", "true")
    assert image_of(page) == tile_of(page, 5)
    expect(page.locator("#trail button")).to_have_count(2)
    page.reload()
    settled(page)
    assert image_of(page) == base64.b64decode(reply["images"][5]["data"]), "the address leads back to it"

    budget(page, 21)
    expect(page.locator("#trail button")).to_have_count(4)
    settled(page)
    assert image_of(page) == expected(server, receipt=reply["images"][5]["receipt"], steps=21)


TEXT_MODEL = {
    "name": "words",
    "description": "Simple things.",
    "qualities": {"low": "dd-1", "medium": "dd-1", "high": "dd-2"},
    "conditioning": "text",
    "image": {"width": 32, "height": 32},
    "examples": ["a red circle", "two blue squares", *(f"{n} dots" for n in range(3, 20))],
    "steps": {"min": 1, "max": 2},
    "plans": [
        {"name": f"dd-{n}", "steps": n, "offered": True, "segments": [["student", 0, 64]], "metrics": {}}
        for n in (1, 2)
    ],
    "budgets": [{"from": n, "to": n, "plan": f"dd-{n}"} for n in (1, 2)],
    "limits": {"n": 4, "prompt": 1000},
}


def test_what_is_typed_while_a_picture_begins_stays(page: Page) -> None:
    page.goto("/")
    settled(page)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/generate", hold)
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function("document.querySelector('#figures').getAttribute('aria-busy') === 'true'")
    seed = page.get_by_label("Seed")
    seed.fill("77")
    held[0].continue_()
    page.unroute("**/generate")
    settled(page)
    expect(seed).to_have_value("77")
    page.get_by_role("button", name="Draw").click()
    settled(page)
    assert read_receipt_of(page).key.newest.seed == 77


def test_a_model_of_prompts_has_a_text_box(page: Page, server: Running) -> None:
    bodies: list[dict[str, object]] = []

    def draw(route: Route) -> None:
        body = route.request.post_data_json
        bodies.append(body)
        condition = body.get("prompt", 8)
        receipt = str(Receipt.of(body["model"], "0" * 16, condition, "dd-1", NoiseKey(body["seed"], 0)))
        route.fulfill(content_type="text/event-stream", body=answered(server, receipt=receipt))

    def both(route: Route) -> None:
        [tiny] = server.client.get("/models").json()["models"]
        route.fulfill(json={"models": [tiny, TEXT_MODEL]})

    page.route("**/models", both)
    page.route("**/generate", draw)
    page.goto("/?label=ship&seed=3&steps=1")
    settled(page)
    assert bodies == [{"model": "tiny", "label": "ship", "seed": 3, "steps": 1}]
    page.get_by_label("Model", exact=True).select_option("words")
    settled(page)
    prompt = page.get_by_label("Prompt")
    expect(prompt).to_have_value("a red circle")
    expect(page.locator("#class-field")).to_be_hidden()
    expect(page.locator("#examples button")).to_have_count(8)
    with page.expect_request("**/generate"):
        page.get_by_role("button", name="two blue squares").click()
    settled(page)
    with page.expect_request("**/generate"):
        prompt.fill("a green line")
        prompt.press("Enter")
    settled(page)
    expect(page.locator("#title")).to_have_text("a green line, seed 3")
    assert (
        page.get_by_role("link", name="Download").get_attribute("download") == "a-green-line-seed-3-dd-1.png"
    )
    common = {"model": "words", "seed": 3, "steps": 2}
    assert bodies[1:] == [
        {**common, "prompt": text} for text in ("a red circle", "two blue squares", "a green line")
    ]
    assert "prompt=a+green+line" in page.url
    assert "model=words" in page.url
    page.reload()
    settled(page)
    expect(prompt).to_have_value("a green line")


def test_of_several_models_the_page_opens_with_the_one_that_reads_text(page: Page, server: Running) -> None:
    def both(route: Route) -> None:
        [tiny] = server.client.get("/models").json()["models"]
        route.fulfill(json={"models": [tiny, TEXT_MODEL]})

    def draw(route: Route) -> None:
        receipt = str(Receipt.of("words", "0" * 16, "a red circle", "dd-1", NoiseKey(0, 0)))
        route.fulfill(content_type="text/event-stream", body=answered(server, receipt=receipt))

    page.route("**/models", both)
    page.route("**/generate", draw)
    with page.expect_request("**/generate") as caught:
        page.goto("/")
    settled(page)
    expect(page.get_by_label("Prompt")).to_have_value("a red circle")
    assert caught.value.post_data_json["model"] == "words"
    expect(page.get_by_label("Model", exact=True).locator("option")).to_have_text(
        ["tiny, from classes", "words, from text"]
    )


def test_a_lone_models_name_is_not_sent(page: Page) -> None:
    with page.expect_request("**/generate") as caught:
        page.get_by_role("button", name="Random").click()
    assert "model" not in caught.value.post_data_json
    settled(page)
