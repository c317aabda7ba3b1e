"""The page's modules alone, in the browser that runs them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.tools import watched
from tests.server.helpers import Running


@pytest.fixture(scope="module")
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """A tab of the server's for all tests here: modules alone leave nothing behind in it."""
    with watched(browser, server.url) as tab:
        tab.goto("/docs")
        yield tab


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_server_sent_events_are_read_however_the_bytes_are_cut(page: Page, size: int) -> None:
    stream = (
        "\ufeff: a comment\n\nevent: image\ndata: {“é”}\n\n"
        "data:one\r\ndata: two\r\nid: 3\r\n\r\nevent: done\rdata\r\r"
        "event: unheard\n\ndata:  spaced\n\nevent: cut\ndata: never ended"
    )
    found = page.evaluate(
        """async ([bytes, size]) => {
          const { eventsOf } = await import("/static/sse.js");
          const all = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0));
          const body = new ReadableStream({ start(controller) {
            for (let at = 0; at < all.length; at += size) controller.enqueue(all.slice(at, at + size));
            controller.close();
          } });
          const found = [];
          for await (const { event, data } of eventsOf(body)) found.push([event, data]);
          return found;
        }""",
        [base64.b64encode(stream.encode()).decode(), size],
    )
    assert found == [["image", "{“é”}"], ["message", "one\ntwo"], ["done", ""], ["message", " spaced"]]


def test_a_reader_who_stops_cancels_the_stream(page: Page) -> None:
    assert page.evaluate(
        """async () => {
          const { eventsOf } = await import("/static/sse.js");
          let cancelled = false;
          const body = new ReadableStream({
            pull: (controller) => controller.enqueue(new TextEncoder().encode("data: x\\n\\n")),
            cancel: () => { cancelled = true; },
          });
          for await (const _ of eventsOf(body)) break;
          return cancelled;
        }"""
    )


def receipts(page: Page, file: bytes) -> Any:
    """What the page finds in a file."""
    return page.evaluate(
        """async (bytes) => {
          const { receiptOf } = await import("/static/receipts.js");
          return receiptOf(Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0)));
        }""",
        base64.b64encode(file).decode(),
    )


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_files_receipt_is_found_and_nothing_in_what_holds_none(
    page: Page, server: Running, image_format: str
) -> None:
    reply = server.post({"label": 3, "seed": str(2**63 - 1), "format": image_format}, accept="image/*")
    file = reply.raise_for_status().content
    assert receipts(page, file) == reply.headers["x-dd-receipt"]
    for part in (b"", file[:20], file[:32], b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF____WEBPEXIF", b"text"):
        assert receipts(page, part) is None


def test_quantiles_are_prometheuss(page: Page) -> None:
    found = page.evaluate(
        """async () => {
          const { quantile, rate, read } = await import("/static/metrics.js");
          const edges = ["0.1", "0.2", "0.4", "+Inf"];
          const text = (counts, labels) => counts.map((n, i) =>
            `dd_request_duration_seconds_bucket{le="${edges[i]}",${labels}} ${n}\\n`).join("");
          const ok = 'model="a \\\\" b",outcome="ok",plan="dd-1"';
          const before = read(text([1, 1, 1, 1], ok), 0);
          const after = read(
            text([1, 5, 9, 11], ok) + text([0, 2, 2, 2], 'outcome="ok"') +
              text([90, 90, 90, 90], 'outcome="invalid"') +
              'dd_images_total{plan="x"} 3\\ndd_images_total{plan="y"} 4\\ndd_queue_depth 5\\nother 9\\n',
            2000,
          );
          return [quantile(0.5, before, after), quantile(0.99, before, after), quantile(0.5, after, after),
            rate(before, after), after.depth];
        }"""
    )
    # 12 came: 6 of them between 0.1 and 0.2, 4 between 0.2 and 0.4, 2 beyond.
    assert found == [pytest.approx(0.2), 0.4, None, 3.5, 5]


def test_an_admin_key_is_asked_for_by_its_name_and_kept_beside_the_other(page: Page) -> None:
    known = {"authorization": "Bearer admin-key"}

    def answer(route: Route) -> None:
        route.fulfill(status=200 if known.items() <= route.request.headers.items() else 401, json={})

    page.route("**/admin/models", answer)
    page.evaluate(
        """async () => {
          sessionStorage.setItem("dd-api-key", "api-key");
          const { ask } = await import("/static/api.js");
          window.asked = ask("admin/models").then((reply) => reply.status);
        }"""
    )
    expect(page.locator("#key-note")).to_contain_text("This needs an admin key.")
    page.locator("#key").fill("admin-key")
    page.locator("#key").press("Enter")
    assert page.evaluate("() => window.asked") == 200
    assert page.evaluate("() => sessionStorage.getItem('dd-api-key')") == "api-key"
