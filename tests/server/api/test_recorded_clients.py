"""Requests that other projects' clients sent to this server, recorded, and what each reads of a reply.

`recorded_clients.json`: client, version, what was asked of it; headers and body as it sent them. `size` and
`warned` are what the reply must say.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.generation.test_runner import parse
from tests.server.helpers import Running, running

PATH = "/v1/images/generations"
RECORDED = json.loads(Path(__file__).with_name("recorded_clients.json").read_text(encoding="utf-8"))
NAMES = sorted({entry["body"]["model"] for entry in RECORDED})


@pytest.fixture(scope="module")
def live(text_folder: Path) -> Iterator[Running]:
    """A server whose model has all names that the clients ask for, by the one flag that there is for it."""
    aliases = ",".join(f"tiny-text={name}" for name in NAMES)
    with running(text_folder, served_model_name=aliases) as live:
        yield live


def size_of(file: bytes) -> str:
    width, height = Image.open(io.BytesIO(file)).size
    return f"{width}x{height}"


@pytest.mark.parametrize(
    "entry", RECORDED, ids=[f"{entry['client']}-{number}" for number, entry in enumerate(RECORDED)]
)
def test_the_request_gives_what_the_client_reads(live: Running, entry: dict[str, Any]) -> None:
    body, size = entry["body"], entry["size"].replace("native", "32x32")
    with httpx.Client(base_url=live.url, timeout=60, headers=entry["headers"]) as client:
        reply = client.post(PATH, content=json.dumps(body))
        assert reply.status_code == 200, reply.text
        if entry["reads"] == "events":
            events = [data for _, data in parse(reply.text)]
            assert len(events) == body["partial_images"] + 1
            files, said = [base64.b64decode(event["b64_json"]) for event in events], events[-1]
        else:
            said = reply.json()
            assert len(said["data"]) == body.get("n", 1)
            links = [entry_.get("url") for entry_ in said["data"]]
            if entry["reads"] == "url":
                files = [client.get(link, headers={"accept": "*/*"}).content for link in links]
            else:
                assert not any(links), "Open WebUI would fetch it, and refuses private addresses"
                files = [base64.b64decode(entry_["b64_json"]) for entry_ in said["data"]]
    assert {size_of(file) for file in files} == {size} == {said["size"]}
    assert {warning["param"] for warning in said["warnings"]} == set(entry["warned"])


def test_every_client_is_named_with_its_version() -> None:
    assert {entry["client"] for entry in RECORDED} == {"AIPerf", "LangChain", "LiteLLM's proxy", "Open WebUI"}
    assert all(any(digit.isdigit() for digit in entry["version"]) for entry in RECORDED)
