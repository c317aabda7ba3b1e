"""Both kinds of client against a real server."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import httpx2
import PIL.Image
import pytest

import distilled_decoding as client
from dd_core.noise import NoiseKey
from distilled_decoding import (
    AsyncClient,
    BadRequestError,
    Client,
    ConflictError,
    ConnectionFailedError,
    DDClientError,
    DeadlineExceededError,
    GenerateOptions,
    ImageEvent,
    InvalidURLError,
    NotFoundError,
    OverloadedError,
    StreamOptions,
    UnauthorizedError,
    errors,
)
from distilled_decoding.contract import GenerateRequest
from server.generation.encoder import read_receipt
from server.generation.receipts import Receipt
from server.launcher import bind
from tests.distilled_decoding.helpers import Caller
from tests.server.helpers import Gate, Running, busy, eventually, running


def test_generate_gives_what_the_server_sends(call: Caller, server: Running, tmp_path: Path) -> None:
    wanted = {"label": "ship", "seed": 7, "n": 2, "steps": 2, "format": "webp"}
    made = call(server.url, lambda c: c.generate(**wanted))
    sent = server.post(wanted).json()
    differing = {"id", "timings"}
    assert made.model_dump(exclude=differing, exclude_none=True) == {
        k: v for k, v in sent.items() if k not in differing
    }
    assert made.timings.total_ms > made.timings.compute_ms > 0
    raw = server.post({**wanted, "n": 1}, accept="image/webp").content
    assert made.images[0].bytes == raw
    assert made.images[1].save(tmp_path / "second.webp").read_bytes() == made.images[1].bytes != raw
    assert made.images[0].data not in repr(made)


@pytest.mark.parametrize("seed", [2**53 - 1, 2**53, 2**63 - 1])
def test_a_seed_is_a_number_whatever_its_size(call: Caller, server: Running, seed: int) -> None:
    """A large one is sent as text, as the contract asks for it."""
    made = call(server.url, lambda c: c.generate(label=3, seed=seed))
    assert made.seed == made.images[0].seed == seed
    assert call(server.url, lambda c: c.generate(label=3, seed=str(seed))).images == made.images


def test_an_image_is_saved_in_the_format_that_its_name_says(
    call: Caller, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once `x.jpg` held a PNG."""
    [received] = call(server.url, lambda c: c.generate(label="ship", seed=7)).images
    assert received.save(tmp_path / "ship").read_bytes() == received.bytes
    assert received.save(tmp_path / "ship.PNG").read_bytes() == received.bytes
    for name, kind in (("ship.jpg", "JPEG"), ("ship.jpeg", "JPEG"), ("ship.webp", "WEBP")):
        with PIL.Image.open(received.save(tmp_path / name)) as image:
            assert (image.format, image.size) == (kind, (32, 32))
        assert read_receipt(tmp_path / name) == received.receipt
    [lossy] = call(server.url, lambda c: c.generate(label="ship", seed=7, format="webp")).images
    with PIL.Image.open(lossy.save(tmp_path / "lossy.png")) as image:
        assert image.format == "PNG"
    assert read_receipt(tmp_path / "lossy.png") == lossy.receipt
    with pytest.raises(ValueError, match=r"ship\.gif must end in \.png, \.jpg"):
        received.save(tmp_path / "ship.gif")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # as if it was not installed
    with pytest.raises(ValueError, match="request format='jpeg'"):
        received.save(tmp_path / "late.jpg")
    assert not (tmp_path / "late.jpg").exists() and not (tmp_path / "ship.gif").exists()


def test_a_stream_gives_every_picture(call: Caller, server: Running) -> None:
    events = call(server.url, lambda c: c.stream(label="ship", seed=7, steps=21))
    assert all(isinstance(event, ImageEvent) for event in events)
    assert [(e.stage, e.plan, e.final) for e in events] == [
        (0, "dd-1", False),
        (1, "dd-2", False),
        (2, "pre-trained-11-21", False),
        (3, "pre-trained-1-21", True),
    ]
    for event in events:
        alone = server.post({"label": "ship", "seed": 7, "steps": event.steps}, accept="image/png")
        assert event.image.bytes == alone.content
    fewer = call(server.url, lambda c: c.stream(label=8, steps=21, partial_images=1))
    assert [e.plan for e in fewer] == ["dd-1", "pre-trained-1-21"]


def test_receipts_repeat_refine_and_vary(call: Caller, server: Running) -> None:
    image = call(server.url, lambda c: c.generate(label=3, seed=5)).images[0]
    assert call(server.url, lambda c: c.image(image.receipt)) == image.bytes
    large = call(server.url, lambda c: c.image(image.receipt, size="128x64"))
    assert PIL.Image.open(io.BytesIO(large)).size == (128, 64)
    jpeg = call(server.url, lambda c: c.image(image.receipt, format="jpeg"))
    assert jpeg.startswith(b"\xff\xd8\xff")
    better = call(server.url, lambda c: c.generate(receipt=image.receipt, steps=2))
    assert better.plan == "dd-2"
    varied = call(server.url, lambda c: c.generate(receipt=image.receipt, keep=0.5, seed=8, n=2))
    assert [v.seed for v in varied.images] == [8, 8]
    assert call(server.url, lambda c: c.image(varied.images[1].receipt)) == varied.images[1].bytes


def test_models_are_described(call: Caller, server: Running) -> None:
    [model] = call(server.url, lambda c: c.models())
    [sent] = server.client.get("/models").json()["models"]
    assert model.model_dump() == sent
    assert [plan.name for plan in model.plans if plan.offered][:2] == ["dd-1", "dd-2"]


def test_ready_says_whether_requests_are_taken(call: Caller, server: Running) -> None:
    assert call(server.url, lambda c: c.ready()) is True
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    taken.close()
    assert call(f"http://127.0.0.1:{port}", lambda c: c.ready()) is False
    with pytest.raises(ConnectionFailedError, match=f"no reply from 127.0.0.1:{port}"):
        call(f"http://127.0.0.1:{port}", lambda c: c.models(), retries=0)


@pytest.mark.parametrize(
    ("options", "kind", "param"),
    [
        ({"label": "shop"}, BadRequestError, "label"),
        ({"label": 1, "seed": -1}, BadRequestError, "seed"),
        ({"label": 1, "colour": "red"}, BadRequestError, "colour"),
        ({"label": 1, "deadline_ms": "soon"}, BadRequestError, "deadline_ms"),
        ({"label": 1, "model": "nothing"}, NotFoundError, "model"),
    ],
)
def test_a_refusal_says_what_the_server_says(
    call: Caller, server: Running, options: dict[str, Any], kind: type[BadRequestError], param: str
) -> None:
    reply = server.post(options)
    with pytest.raises(kind) as caught:
        call(server.url, lambda c: c.generate(**options))
    error, said = caught.value, reply.json()["error"]
    assert (error.status, error.code, error.message, error.param) == (
        reply.status_code,
        *(said[name] for name in ("code", "message", "param")),
    )
    assert re.fullmatch(r"[0-9a-f-]{8,}", error.request_id)
    assert str(error) == f"{error.message} ({error.status} {error.code}, request {error.request_id})"
    with pytest.raises(kind):
        call(server.url, lambda c: c.stream(**options))


def test_a_receipt_of_other_weights_is_a_conflict(call: Caller, server: Running) -> None:
    other = str(Receipt.of("tiny", "0" * 64, 1, "dd-1", NoiseKey(1, 0)))
    with pytest.raises(ConflictError) as caught:
        call(server.url, lambda c: c.image(other))
    assert caught.value.code == "other_weights"


def test_a_full_server_and_a_deadline(call: Caller, bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, queue_size=1, max_images=1) as live, ThreadPoolExecutor() as pool:
        first = busy(live, gate, pool)
        waiting = pool.submit(live.post, {"label": 1})
        eventually(lambda: live.depth == 1, "the queue is full")
        with pytest.raises(OverloadedError) as full:
            call(live.url, lambda c: c.generate(label=2), retries=0)
        assert (full.value.status, full.value.code) == (429, "queue_full")
        assert full.value.retry_after >= 1
        gate.open.set()
        assert first.result().status_code == waiting.result().status_code == 200
        again = busy(live, gate, pool)
        with pytest.raises(DeadlineExceededError) as late:
            call(live.url, lambda c: c.generate(label=2, deadline_ms=300))
        assert late.value.status == 504
        gate.open.set()
        again.result()


def test_a_key_is_sent(call: Caller, bundle_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:a-key-of-some-length\n")
    with running(bundle_folder, api_keys_file=keys, warmup=False) as live:
        assert call(live.url, lambda c: c.generate(label=1), api_key="a-key-of-some-length").images
        assert call(live.url, lambda c: c.ready())
        with pytest.raises(UnauthorizedError):
            call(live.url, lambda c: c.models())


CANCELED = {"model": "tiny", "plan": "teacher", "outcome": "canceled"}


def test_leaving_a_stream_stops_the_server(bundle_folder: Path) -> None:
    """With `break`, `closing` and `aclosing`, while the client itself stays open."""

    def canceled(times: int) -> None:
        eventually(lambda: live.metric("dd_requests_total", **CANCELED) == times, f"{times} were canceled")

    async def leave() -> None:
        async with AsyncClient(live.url) as client:
            async with aclosing(client.stream(label=1, steps=64)) as events:
                await anext(events)
            await asyncio.to_thread(canceled, 3)

    with running(bundle_folder, warmup=False) as live:
        with Client(live.url) as client:
            for _ in client.stream(label=1, steps=64):
                break
            canceled(1)
            with closing(client.stream(label=1, steps=64)) as events:
                next(events)
            canceled(2)
        asyncio.run(leave())


def test_the_options_are_the_fields_of_the_contract() -> None:
    fields = set(GenerateRequest.model_fields)
    assert set(StreamOptions.__annotations__) | set(GenerateOptions.__annotations__) == fields
    assert set(GenerateOptions.__annotations__) == fields - {"partial_images"}


def test_every_error_is_exported() -> None:
    defined = {
        name
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, errors.DDClientError)
    }
    assert defined == {name for name in client.__all__ if name.endswith("Error")}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "//host",
        "ftp://host",
        "http://",
        "http:///path",
        "http://host:port",
        "http://host/?a=1",
    ],
)
def test_a_wrong_base_url_is_refused(kind: type[Client | AsyncClient], url: str) -> None:
    with pytest.raises(
        InvalidURLError, match=rf"must be http://host.*, not {re.escape(repr(url))}"
    ) as caught:
        kind(url)
    assert isinstance(caught.value, DDClientError)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.param, caught.value.code, caught.value.status) == ("base_url", "invalid_url", None)


def test_a_server_below_a_path(call: Caller) -> None:
    """Behind a proxy that serves it at /dd."""
    urls: list[str] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        urls.append(str(request.url))
        return httpx2.Response(200, content=b"a picture")

    receipt = "dd1.a/b"
    transport = httpx2.MockTransport(handler)
    assert call("http://host/dd/", lambda c: c.image(receipt, "png"), transport=transport) == b"a picture"
    assert urls == ["http://host/dd/images/dd1.a%2Fb?format=png"]
