"""Pictures that are made again from their receipts, and varied."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.tools import budget, drop, expected, image_of, read_receipt_of, settled, tile_of
from tests.server.helpers import Running


def vary(page: Page, keep: int) -> None:
    page.get_by_role("slider", name="Keep").fill(str(keep))
    page.get_by_role("button", name="Vary").click()
    settled(page)


def test_variations_share_their_bases_receipt_chain(page: Page, server: Running) -> None:
    page.goto("/?label=cat&seed=21&steps=2")
    settled(page)
    base, base_file = read_receipt_of(page), image_of(page)
    vary(page, 25)
    expect(page.locator("#tiles img[src]")).to_have_count(8)
    assert tile_of(page, 0) == base_file == image_of(page)
    assert len({tile_of(page, i) for i in range(8)}) > 4
    page.locator("#tiles button").nth(3).click()
    first = read_receipt_of(page)
    assert (first.key.seed, first.key.index) == (base.key.seed, base.key.index)
    assert [(splice.block, splice.index) for splice in first.key.splices] == [(16, 2)]
    assert first.plan == base.plan
    assert image_of(page) == expected(server, receipt=str(first))

    vary(page, 75)
    page.locator("#tiles button").nth(1).click()
    second = read_receipt_of(page)
    assert second.key.splices[:-1] == first.key.splices
    assert second.key.splices[-1].block == 48
    assert image_of(page) == expected(server, receipt=str(second))
    expect(page.locator("#title")).to_have_text("cat, seed 21, varied 2 times")


def test_variations_of_variations_end_in_the_servers_words(page: Page) -> None:
    for keep in range(10, 90, 10):
        vary(page, keep)
        page.locator("#tiles button").nth(1).click()
    expect(page.locator("#title")).to_contain_text("varied 8 times")
    shown = image_of(page)
    vary(page, 95)
    expect(page.get_by_role("alert")).to_contain_text("8 times over")
    assert image_of(page) == shown


def test_a_dropped_file_gives_its_very_image_again(page: Page, server: Running) -> None:
    file = expected(server, label="truck", seed=9, steps=64)
    drop(page, file, "saved.png")
    expect(page.locator("#trail button").last).to_contain_text("64 passes")
    settled(page)
    assert image_of(page) == file
    assert page.get_by_label("truck").is_checked()
    assert page.get_by_label("Seed").input_value() == "9"
    page.reload()
    settled(page)
    assert image_of(page) == file, "the address holds the receipt"
    budget(page, 2)
    expect(page.locator("#trail button")).to_have_count(2)
    settled(page)
    assert image_of(page) == expected(server, label="truck", seed=9, steps=2), "the same noise, another plan"


def test_a_receipt_is_repeated_from_a_file_a_paste_and_a_link(page: Page, server: Running) -> None:
    reply = server.post({"label": "bird", "seed": 6, "steps": 2, "format": "jpeg"}, accept="image/jpeg")
    receipt = reply.headers["x-dd-receipt"]
    png = expected(server, receipt=receipt)
    page.locator("#file").set_input_files(
        {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": reply.content}
    )
    expect(page.locator("#title")).to_have_text("bird, seed 6")
    settled(page)
    assert image_of(page) == png
    page.get_by_role("button", name="Random").click()
    settled(page)
    page.get_by_label("From a picture").fill(f"{server.url}/images/{receipt}")
    page.get_by_role("button", name="Repeat").click()
    expect(page.locator("#title")).to_have_text("bird, seed 6")
    settled(page)
    assert image_of(page) == png


def test_what_holds_no_receipt_is_refused(page: Page) -> None:
    shown = image_of(page)
    drop(page, b"\x89PNG\r\n\x1a\n", "other.png")
    expect(page.get_by_role("alert")).to_contain_text("other.png holds no receipt")
    page.get_by_label("From a picture").fill("dd1.nonsense")
    with page.expect_response("**/generate") as caught:
        page.get_by_label("From a picture").press("Enter")
    assert caught.value.status == 400
    expect(page.get_by_role("alert")).to_contain_text("receipt is damaged")
    expect(page.get_by_label("From a picture")).to_have_attribute("aria-invalid", "true")
    assert image_of(page) == shown
    budget(page, 2)  # of what is shown, and not of what was refused
    expect(page.locator("#trail button")).to_have_count(2)
    settled(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#title")).to_have_text("airplane, seed 7")
