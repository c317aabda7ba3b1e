"""What is saved from the page: sizes, formats, sheets, archives."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Download, Page, expect

from tests.browser.tools import drop, image_of, receipt_of, settled, tile_of
from tests.server.helpers import Running


def saved(page: Page, button: str) -> tuple[str, bytes]:
    """Name and bytes of what a press saves."""
    with page.expect_download() as caught:
        page.get_by_text(button, exact=True).click()
    return caught.value.suggested_filename, Path(caught.value.path()).read_bytes()


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


@pytest.mark.parametrize("scale", [8, 16])
def test_a_larger_picture_has_the_same_pixels_and_the_receipt(page: Page, scale: int) -> None:
    small = opened(image_of(page))
    page.get_by_label("Size of a download").select_option(str(scale))
    name, file = saved(page, "Download")
    assert name == f"airplane-seed-7-dd-1-{scale}x.png"
    large = opened(file)
    assert large.size == (32 * scale, 32 * scale)
    assert large.tobytes() == small.resize(large.size, Image.Resampling.NEAREST).tobytes()
    assert Image.open(io.BytesIO(file)).info["dd-receipt"] == receipt_of(page)  # type: ignore[attr-defined]
    page.get_by_role("button", name="Random").click()
    settled(page)
    drop(page, file, name)
    expect(page.locator("#title")).to_have_text("airplane, seed 7")
    settled(page)


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_the_format_can_be_chosen(page: Page, server: Running, image_format: str) -> None:
    page.get_by_label("Format of a download").select_option(image_format)
    name, file = saved(page, "Download")
    assert name == f"airplane-seed-7-dd-1.{image_format}"
    assert file == server.client.get(f"/images/{receipt_of(page)}?format={image_format}").content
    page.get_by_label("Size of a download").select_option("8")
    _, large = saved(page, "Download")
    assert Image.open(io.BytesIO(large)).format == image_format.upper()
    assert opened(large).size == (256, 256)


def test_a_browser_that_cannot_write_a_format_says_so(page: Page) -> None:
    """It gives a PNG in place of what it was asked for, which was saved under a WebP's name."""
    page.evaluate(
        """() => {
          const real = HTMLCanvasElement.prototype.toBlob;
          HTMLCanvasElement.prototype.toBlob = function (done) { real.call(this, done); };
        }"""
    )
    page.get_by_label("Format of a download").select_option("webp")
    page.get_by_label("Size of a download").select_option("8")
    page.get_by_text("Download", exact=True).click()
    expect(
        page.get_by_text("This browser cannot write image/webp files: choose another format.")
    ).to_be_visible()


def test_before_a_picture_has_come_there_is_nothing_to_save(page: Page) -> None:
    """The link is still of the picture before."""
    begun = "event: ping\ndata: {}\n\n"  # accepted, and over before a first stage
    page.route("**/generate", lambda route: route.fulfill(body=begun, content_type="text/event-stream"))
    page.get_by_role("button", name="Random").click()
    expect(page.get_by_role("alert")).to_contain_text("ended before the picture was done")
    saved: list[Download] = []
    page.on("download", lambda one: saved.append(one))  # noqa: PLW0108 (it takes no builtin)
    page.get_by_role("link", name="Download").click()
    page.wait_for_timeout(300)
    assert saved == []
    expect(page.get_by_role("alert")).not_to_contain_text("undefined")


def test_a_gallery_is_saved_as_one_file_and_as_a_sheet(page: Page) -> None:
    page.get_by_label("Gallery size").fill("5")
    page.get_by_role("button", name="Gallery").click()
    settled(page)
    expect(page.locator("#tiles img[src]")).to_have_count(5)
    tiles = [tile_of(page, i) for i in range(5)]
    name, file = saved(page, "Download all (ZIP)")
    assert name == "5-pictures-of-airplane-seed-7.zip"
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert [archive.read(each) for each in names] == tiles
    assert names[:2] == ["airplane-seed-7-dd-1.png", "airplane-seed-7-1-dd-1.png"]
    name, file = saved(page, "Download as a sheet")
    assert name == "5-pictures-of-airplane-seed-7.png"
    sheet = opened(file)
    assert sheet.size == (3 * 264 + 8, 2 * 264 + 8)
    assert sheet.crop((8, 272, 264, 528)).resize((32, 32), 0).tobytes() == opened(tiles[3]).tobytes()


def test_names_in_an_archive_are_unique(page: Page) -> None:
    data = page.evaluate(
        """async () => {
          const { zip } = await import("/static/files.js");
          const bytes = new TextEncoder().encode("é");
          const file = zip([["a.png", bytes], ["a.png", bytes], ["ü.png", new Uint8Array()]]);
          return [...new Uint8Array(await file.arrayBuffer())];
        }"""
    )
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
        assert {each: archive.read(each).decode() for each in archive.namelist()} == {
            "a.png": "é",
            "a-2.png": "é",
            "ü.png": "",
        }
