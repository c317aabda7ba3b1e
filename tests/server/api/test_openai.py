"""OpenAI's images route, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.server.helpers import Gate, Running, Turnstile, busy, eventually, running

PATH = "/v1/images/generations"


def client_of(live: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server) as found:
        yield found


def picture(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_script_moves_over_by_its_base_url(client: openai.OpenAI, server: Running) -> None:
    reply = client.images.generate(
        model="tiny", prompt="ship", n=2, size="auto", quality="low", extra_body={"seed": 7}
    )
    assert reply.data is not None and len(reply.data) == 2
    assert (reply.output_format, reply.size, reply.quality, reply.background) == (
        "png",
        "32x32",
        "low",
        "opaque",
    )
    assert reply.created > 1_700_000_000
    ours = server.post({"label": "ship", "seed": 7, "n": 2}).json()["images"]
    assert [image.b64_json for image in reply.data] == [image["data"] for image in ours]


def test_the_async_client(server: Running) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            return await client.images.generate(prompt="cat", quality="low", extra_body={"seed": 1})

    reply = asyncio.run(ask())
    assert reply.data[0].b64_json == server.post({"label": "cat", "seed": 1}).json()["images"][0]["data"]


def test_a_stream_of_partial_images(client: openai.OpenAI, server: Running) -> None:
    """Three previews of the full teacher's picture: each is the picture of its own plan."""
    stream = client.images.generate(
        prompt="ship", quality="high", stream=True, partial_images=3, extra_body={"seed": 7}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]  # type: ignore[union-attr]
    shown = [
        server.post({"label": "ship", "seed": 7, "steps": steps}).json()["images"][0]["data"]
        for steps in (1, 2, 12, 64)
    ]
    assert [event.b64_json for event in events] == shown
    last = events[-1]
    assert (last.size, last.quality, last.background, last.output_format) == (
        "32x32",
        "high",
        "opaque",
        "png",
    )


def test_a_stream_without_previews_by_default(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="ship", quality="medium", stream=True))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_the_async_client_streams(server: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            stream = await client.images.generate(
                prompt="frog", quality="high", stream=True, partial_images=1
            )
            return [event.type async for event in stream]

    assert asyncio.run(ask()) == ["image_generation.partial_image", "image_generation.completed"]


@pytest.mark.parametrize(
    ("quality", "plan"),
    [
        ("low", "dd-1"),
        ("medium", "pre-trained-11-21"),
        ("standard", "pre-trained-11-21"),
        ("hd", "teacher"),
        ("high", "teacher"),
    ],
)
def test_quality_is_passes(server: Running, quality: str, plan: str) -> None:
    assert server.client.post(PATH, json={"prompt": "ship", "quality": quality}).json()["plan"] == plan


@pytest.mark.parametrize(("name", "pillow"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client: openai.OpenAI, name: Any, pillow: str) -> None:
    reply = client.images.generate(prompt="ship", quality="low", output_format=name, size="32x32")
    assert picture(reply.data[0].b64_json).format == pillow
    assert reply.output_format == name


def test_compression_makes_files_smaller(client: openai.OpenAI) -> None:
    def length(compression: int) -> int:
        reply = client.images.generate(
            prompt="ship",
            quality="low",
            output_format="webp",
            output_compression=compression,
            extra_body={"seed": 1},
        )
        return len(reply.data[0].b64_json)

    assert length(5) < length(60) < length(100)


def test_a_url_leads_to_the_image(client: openai.OpenAI, server: Running) -> None:
    asked: dict[str, Any] = {
        "prompt": "ship",
        "quality": "low",
        "output_format": "webp",
        "extra_body": {"seed": 3},
    }
    link = client.images.generate(response_format="url", **asked).data[0].url
    assert link is not None and link.startswith(server.url)
    inline = client.images.generate(**asked).data[0].b64_json
    assert httpx.get(link).content == base64.b64decode(inline or "")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "distilled-decoding"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"size": "4096x4096"}, "size", "2048"),
        ({"prompt": "a castle"}, "prompt", "airplane"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": 8}, "prompt", "string"),
        ({"n": 0}, "n", "greater"),
        ({"n": 17}, "n", "1 to 16"),
        ({"quality": "best"}, "quality", "'low'"),
        ({"background": "red"}, "background", "'opaque'"),
        ({"output_format": "gif"}, "output_format", "'webp'"),
        ({"partial_images": 2}, "partial_images", "stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
        ({"stream": True, "response_format": "url"}, "response_format", "b64_json"),
        ({"mask": "x"}, "mask", "unknown field"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_can(
    server: Running, body: dict[str, Any], param: str, says: str
) -> None:
    reply = server.client.post(PATH, json={"prompt": "ship", **body})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["type"], error["code"]) == (
        param,
        "invalid_request_error",
        "invalid_request",
    )
    assert says in error["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "invalid_json"), (b"{", "invalid_json"), (b"\xff", "invalid_json"), (b"[]", "invalid_request")],
)
def test_a_body_that_is_no_object(server: Running, content: bytes, code: str) -> None:
    reply = server.client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


def test_every_error_has_a_type(server: Running) -> None:
    for reply in (
        server.client.get("/v1/nothing"),
        server.client.get(PATH),
        server.client.post(PATH, content=b"x" * 70_000),
    ):
        assert reply.json()["error"]["type"] in ("not_found_error", "invalid_request_error")


def test_refusals_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="ship", size="5120x5120")
    assert (bad.value.param, bad.value.type) == ("size", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3'"):
        client.images.generate(prompt="ship", model="dall-e-3")


def test_a_full_queue_is_a_rate_limit_that_the_client_waits_out(bundle_folder: Path, gate: Gate) -> None:
    with (
        running(bundle_folder, gate, queue_size=1, max_images=1, warmup=False) as live,
        ThreadPoolExecutor(3) as pool,
    ):
        first = busy(live, gate, pool)
        second = pool.submit(live.post, {"label": 1})
        eventually(lambda: live.depth == 1, "the queue is full")
        with client_of(live) as client:
            with pytest.raises(openai.RateLimitError) as refused:
                client.images.generate(prompt="ship", quality="low")
            assert refused.value.response.headers["retry-after"] == "1"
            patient = pool.submit(
                client.with_options(max_retries=5).images.generate, prompt="ship", quality="low"
            )
            gate.open.set()
            assert patient.result().data
        assert first.result().status_code == second.result().status_code == 200


def test_what_fails_in_a_stream_reaches_the_client(bundle_folder: Path, gate: Gate) -> None:
    gate.open = Turnstile()  # one pass, which is the first picture
    with running(bundle_folder, gate, warmup=False) as live, client_of(live) as client:
        stream = client.images.generate(prompt="deer", quality="high", stream=True, partial_images=3)
        assert next(iter(stream)).type == "image_generation.partial_image"
        gate.poisoned.value = 4
        gate.open.set()
        with pytest.raises(openai.APIError, match="the device failed"):
            list(stream)
        eventually(lambda: live.metric("dd_inflight_requests") == 0, "the stream is over")


def test_keys_are_bearer_tokens_as_with_openai(bundle_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("somebody:a-key-of-somebody\n")
    with running(bundle_folder, api_keys_file=keys, warmup=False) as live:
        with client_of(live) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        right = openai.OpenAI(base_url=f"{live.url}/v1", api_key="a-key-of-somebody")
        with right:
            assert right.images.generate(prompt="ship", quality="low").data
