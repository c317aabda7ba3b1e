"""OpenAI's client for JavaScript in a page of another origin, with nothing but the server's address."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.server.helpers import PATIENCE, running

CLIENT = "openai@7.59.0"
PAGE = """<!doctype html><meta charset="utf-8"><pre></pre><script type="module">
import OpenAI from "./package/index.mjs";
const client = new OpenAI({ apiKey: "none", baseURL: "SERVER/v1", dangerouslyAllowBrowser: true });
const said = [];
try {
  said.push((await client.models.list()).data[0].id);
  const one = await client.images.generate({ model: "gpt-image-1", prompt: "red heart" });
  said.push(one.size, atob(one.data[0].b64_json).slice(1, 4));
  const asked = { model: "gpt-image-1", prompt: "red apple", size: "1024x1024", quality: "high" };
  for await (const event of await client.images.generate({ ...asked, stream: true, partial_images: 1 }))
    said.push(event.type.split(".")[1], event.size, event.usage?.total_tokens ?? "");
  const wrong = await client.images.generate({ ...asked, prompt: "" }).catch((error) => error);
  said.push(wrong.constructor.name, wrong.status, wrong.param);
} catch (error) {
  said.push("failed", error.message);
}
document.querySelector("pre").textContent = said.join(" ");
</script>"""


class Files(http.server.SimpleHTTPRequestHandler):
    """A folder's files, over connections that stay: the client is hundreds of modules."""

    protocol_version = "HTTP/1.1"

    def guess_type(self, path: str | os.PathLike[str]) -> str:
        """The type of a file, by its name."""
        return "text/javascript" if str(path).endswith(".mjs") else super().guess_type(path)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the client lies in, as npm has it."""
    folder = tmp_path_factory.mktemp("npm")
    if shutil.which("npm") is None:
        pytest.skip("no npm on this machine")
    try:
        packed = subprocess.run(
            ["npm", "pack", "--silent", CLIENT],
            cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.skip("npm's registry does not answer")
    if packed.returncode:
        pytest.skip(f"npm's registry gave no {CLIENT}: {packed.stderr.strip()[-200:]}")
    shutil.unpack_archive(folder / packed.stdout.split()[-1], folder)
    return folder


@pytest.fixture
def elsewhere(package: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the origin of another host that it is served from."""
    handler = functools.partial(Files, directory=str(package))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield package, f"http://localhost:{server.server_port}"
        server.shutdown()


def test_openais_client_draws_in_a_page_of_another_origin(
    browser: Browser, text_folder: Path, elsewhere: tuple[Path, str]
) -> None:
    folder, origin = elsewhere
    with running(text_folder, cors_origins=origin, served_model_name="tiny-text=gpt-image-1") as live:
        (folder / "page.html").write_text(PAGE.replace("SERVER", live.url), encoding="utf-8")
        tab = browser.new_page()
        tab.goto(f"{origin}/page.html")
        expect(tab.locator("pre")).to_have_text(
            "tiny-text 32x32 PNG partial_image 1024x1024  completed 1024x1024 0 BadRequestError 400 prompt",
            timeout=1e3 * PATIENCE,
        )
        tab.close()
