"""The Python client against a real server: both kinds, the same in everything."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

import distilled_decoding as client
from dd_core.errors import InvalidRequestError
from dd_core.noise import NoiseKey
from distilled_decoding import (
    AsyncClient,
    BadRequestError,
    Client,
    ConflictError,
    ConnectionFailedError,
    DeadlineExceededError,
    GenerateOptions,
    ImageEvent,
    NotFoundError,
    OverloadedError,
    StreamOptions,
    UnauthorizedError,
    errors,
)
from distilled_decoding.contract import GenerateRequest
from server.generation.receipts import Receipt
from server.launcher import bind
from tests.distilled_decoding.helpers import Asker
from tests.server.helpers import Gate, Running, busy, eventually, running


def test_generate_gives_what_the_server_sends(ask: Asker, server: Running, tmp_path: Path) -> None:
    wanted = {"label": "ship", "seed": 7, "n": 2, "steps": 2, "format": "webp"}
    made = ask(server.url, lambda c: c.generate(**wanted))
    sent = server.post(wanted).json()
    differing = {"id", "timings"}
    assert made.model_dump(exclude=differing) == {k: v for k, v in sent.items() if k not in differing}
    assert made.timings.total_ms > made.timings.compute_ms > 0
    raw = server.post({**wanted, "n": 1}, accept="image/webp").content
    assert made.images[0].bytes == raw
    assert made.images[1].save(tmp_path / "second.webp").read_bytes() == made.images[1].bytes != raw
    assert made.images[0].data not in repr(made)


def test_a_stream_gives_every_picture(ask: Asker, server: Running) -> None:
    events = ask(server.url, lambda c: c.stream(label="ship", seed=7, steps=21))
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
    fewer = ask(server.url, lambda c: c.stream(label=8, steps=21, partial_images=1))
    assert [e.plan for e in fewer] == ["dd-1", "pre-trained-1-21"]


def test_receipts_repeat_refine_and_vary(ask: Asker, server: Running) -> None:
    image = ask(server.url, lambda c: c.generate(label=3, seed=5)).images[0]
    assert ask(server.url, lambda c: c.image(image.receipt)) == image.bytes
    jpeg = ask(server.url, lambda c: c.image(image.receipt, format="jpeg"))
    assert jpeg.startswith(b"\xff\xd8\xff")
    better = ask(server.url, lambda c: c.generate(receipt=image.receipt, steps=2))
    assert better.plan == "dd-2"
    varied = ask(server.url, lambda c: c.generate(receipt=image.receipt, keep=0.5, seed=8, n=2))
    assert [v.seed for v in varied.images] == [8, 8]
    assert ask(server.url, lambda c: c.image(varied.images[1].receipt)) == varied.images[1].bytes


def test_models_are_described(ask: Asker, server: Running) -> None:
    [model] = ask(server.url, lambda c: c.models())
    [sent] = server.client.get("/models").json()["models"]
    assert model.model_dump() == sent
    assert [plan.name for plan in model.plans if plan.offered][:2] == ["dd-1", "dd-2"]


def test_ready_says_whether_requests_are_taken(ask: Asker, server: Running) -> None:
    assert ask(server.url, lambda c: c.ready()) is True
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    taken.close()
    assert ask(f"http://127.0.0.1:{port}", lambda c: c.ready()) is False
    with pytest.raises(ConnectionFailedError, match=f"no reply from 127.0.0.1:{port}"):
        ask(f"http://127.0.0.1:{port}", lambda c: c.models(), retries=0)


@pytest.mark.parametrize(
    ("options", "kind", "param"),
    [
        ({"label": "shop"}, BadRequestError, "label"),
        ({"label": 1, "seed": -1}, BadRequestError, "seed"),
        ({"label": 1, "colour": "red"}, BadRequestError, "colour"),
        ({"label": 1, "model": "nothing"}, NotFoundError, "model"),
    ],
)
def test_a_refusal_says_what_the_server_says(
    ask: Asker, server: Running, options: dict[str, Any], kind: type[BadRequestError], param: str
) -> None:
    reply = server.post(options)
    with pytest.raises(kind) as caught:
        ask(server.url, lambda c: c.generate(**options))
    error, said = caught.value, reply.json()["error"]
    assert (error.status, error.code, error.message, error.param) == (
        reply.status_code,
        *(said[name] for name in ("code", "message", "param")),
    )
    assert re.fullmatch(r"[0-9a-f-]{8,}", error.request_id)
    assert str(error) == f"{error.message} ({error.status} {error.code}, request {error.request_id})"
    with pytest.raises(kind):
        ask(server.url, lambda c: c.stream(**options))


def test_a_receipt_of_other_weights_is_a_conflict(ask: Asker, server: Running) -> None:
    other = str(Receipt.of("tiny", "0" * 64, 1, "dd-1", NoiseKey(1, 0)))
    with pytest.raises(ConflictError) as caught:
        ask(server.url, lambda c: c.image(other))
    assert caught.value.code == "other_weights"


def test_a_full_server_and_a_deadline(ask: Asker, bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, queue_size=1, max_images=1) as live, ThreadPoolExecutor() as pool:
        first = busy(live, gate, pool)
        waiting = pool.submit(live.post, {"label": 1})
        eventually(lambda: live.depth == 1, "the queue is full")
        with pytest.raises(OverloadedError) as full:
            ask(live.url, lambda c: c.generate(label=2), retries=0)
        assert (full.value.status, full.value.code) == (429, "queue_full")
        assert full.value.retry_after >= 1
        gate.open.set()
        assert first.result().status_code == waiting.result().status_code == 200
        again = busy(live, gate, pool)
        with pytest.raises(DeadlineExceededError) as late:
            ask(live.url, lambda c: c.generate(label=2, deadline_ms=300))
        assert late.value.status == 504
        gate.open.set()
        again.result()


def test_a_key_is_sent(ask: Asker, bundle_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:a-key-of-some-length\n")
    with running(bundle_folder, api_keys_file=keys) as live:
        assert ask(live.url, lambda c: c.generate(label=1), api_key="a-key-of-some-length").images
        assert ask(live.url, lambda c: c.ready())
        with pytest.raises(UnauthorizedError):
            ask(live.url, lambda c: c.models())


CANCELED = {"model": "tiny", "plan": "teacher", "outcome": "canceled"}


def test_leaving_a_stream_stops_the_server(bundle_folder: Path) -> None:
    """By `break`, by `closing` and by `aclosing`, while the client itself stays open."""

    def noticed(times: int) -> None:
        eventually(lambda: live.metric("dd_requests_total", **CANCELED) == times, f"{times} were noticed")

    async def leave() -> None:
        async with AsyncClient(live.url) as client:
            async with aclosing(client.stream(label=1, steps=64)) as events:
                await anext(events)
            await asyncio.to_thread(noticed, 3)

    with running(bundle_folder) as live:
        with Client(live.url) as client:
            for _ in client.stream(label=1, steps=64):
                break
            noticed(1)
            with closing(client.stream(label=1, steps=64)) as events:
                next(events)
            noticed(2)
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
def test_an_address_without_a_scheme_is_refused(kind: type[Client]) -> None:
    with pytest.raises(InvalidRequestError, match="must begin with http") as caught:
        kind("localhost:8000")
    assert caught.value.param == "base_url"


def test_a_server_below_a_path(ask: Asker) -> None:
    """Behind a proxy that serves it at /dd."""
    asked: list[str] = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        return httpx2.Response(200, content=b"a picture")

    receipt = "dd1.a/b"
    transport = httpx2.MockTransport(handler)
    assert ask("http://host/dd/", lambda c: c.image(receipt, "png"), transport=transport) == b"a picture"
    assert asked == ["http://host/dd/images/dd1.a%2Fb?format=png"]
