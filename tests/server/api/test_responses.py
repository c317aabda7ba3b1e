"""A run is sent as one body, or as events; what it owns is closed at its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import Response

from server.api import responses
from server.api.responses import ReplyWriter, send
from server.errors import DrainingError
from server.generation.encoder import GeneratedImage
from server.observability.metrics import Metrics
from server.observability.record import RequestRecord
from tests.server.generation.test_runner import parse


@dataclass
class Run:
    """As much of a `GenerationRun` as sending needs."""

    images: AsyncIterator[Any]
    generation: Any
    record: RequestRecord

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.images


class Writer(ReplyWriter):
    def body(self, images: Any) -> Response:
        return Response(json.dumps([image.index for image in images]))

    def event(self, image: GeneratedImage) -> tuple[str, dict[str, Any]]:
        return "image", {"index": image.index}

    def end(self) -> tuple[str, dict[str, Any]]:
        return "done", {}


async def arriving(error: Exception | None = None, pause: float = 0.0) -> AsyncIterator[Any]:
    for index in range(2):
        await asyncio.sleep(pause)
        yield SimpleNamespace(index=index)
    if error is not None:
        raise error


def sent(streamed: bool, made: AsyncIterator[Any]) -> tuple[str, bool, str]:
    """What a client gets; whether what the reply owns was closed behind it; the outcome."""
    closed, context = [], {}
    parts: list[bytes] = []
    record = RequestRecord(Metrics(), context, "r", 0.0, log_prompts=False)
    run = Run(made, SimpleNamespace(streamed=streamed, keys=(1, 2)), record)

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def keep(message: Any) -> None:
        parts.append(message.get("body", b""))

    async def scene() -> None:
        with ExitStack() as owned:
            owned.enter_context(record)
            owned.callback(lambda: closed.append(True))
            reply = await send(Writer(run), owned)  # type: ignore[arg-type]
        assert closed == ([] if streamed else [True])
        await reply({"type": "http", "method": "POST"}, receive, keep)  # type: ignore[arg-type]

    asyncio.run(scene())
    return b"".join(parts).decode(), closed == [True], context["outcome"]


def test_all_images_are_one_body() -> None:
    assert sent(False, arriving()) == ("[0, 1]", True, "ok")


def test_a_run_that_fails_before_its_body_raises() -> None:
    with pytest.raises(DrainingError):
        sent(False, arriving(DrainingError("over", retry_after=1)))


def test_a_stream_is_an_event_an_image_and_its_end() -> None:
    text, closed, outcome = sent(True, arriving())
    assert parse(text) == [("image", {"index": 0}), ("image", {"index": 1}), ("done", {})]
    assert closed and outcome == "ok"


@pytest.mark.parametrize(
    ("error", "code", "outcome"),
    [
        (DrainingError("over", retry_after=1), "draining", "rejected"),
        (ZeroDivisionError("secret"), "internal_error", "error"),
    ],
)
def test_a_stream_that_fails_says_so_in_its_last_event(error: Exception, code: str, outcome: str) -> None:
    text, closed, counted = sent(True, arriving(error))
    *images, (name, data) = parse(text)
    assert len(images) == 2 and name == "error" and data["error"]["code"] == code
    assert "secret" not in text and closed and counted == outcome


def test_a_stream_that_is_silent_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy closes a connection on which nothing comes: a comment does, now and then."""
    monkeypatch.setattr(responses, "PING_SECONDS", 0.02)
    text, _, _ = sent(True, arriving(pause=0.1))
    assert ": waiting" in text and text.index(": waiting") < text.index("event: image")
