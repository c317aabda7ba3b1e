"""A fake transport that gives prepared replies, and a fake clock: no socket is opened and no time passes."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import orjson
import pytest

from distilled_decoding import aio, client, retries
from tests.distilled_decoding.helpers import Caller

IMAGE = {
    "index": 0,
    "seed": 7,
    "format": "png",
    "width": 32,
    "height": 32,
    "receipt": "dd1.x",
    "data": base64.b64encode(b"a picture").decode(),
}
FIELDS = {
    "id": "r",
    "model": "tiny",
    "plan": "dd-1",
    "requested_plan": "dd-1",
    "steps": 1,
    "seed": 7,
    "timings": {"queue_ms": 0.0, "compute_ms": 1.0, "encode_ms": 1.0, "total_ms": 2.0},
}
IMAGE_EVENT = orjson.dumps({**FIELDS, "stage": 0, "final": True, "image": IMAGE}).decode()
DONE_EVENT = '{"id": "r", "images": 1, "total_ms": 3.0}'

Answer = Callable[[httpx2.Request], httpx2.Response]


def refusal(status: int, code: str = "some_code", **headers: str) -> Answer:
    body = {"error": {"code": code, "message": "a message", "param": "field"}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: httpx2.Response(status, json=body, headers={"x-request-id": "abc", **named})


def success(_: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, json={**FIELDS, "images": [IMAGE]})


def broken(kind: type[httpx2.TransportError]) -> Answer:
    def fail(request: httpx2.Request) -> httpx2.Response:
        raise kind("it broke", request=request)

    return fail


def stream(*events: tuple[str, str]) -> Answer:
    text = "".join(f"event: {name}\ndata: {data}\n\n" for name, data in events)
    return lambda _: httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})


class BrokenStream(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that breaks off after its first bytes."""

    def __init__(self, start: bytes) -> None:
        self.start = start
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield self.start
        raise httpx2.ReadError("it broke")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.close()


@dataclass
class FakeServer:
    """Answers the calls of a client with prepared replies; records the requests and the client's waits."""

    caller: Caller
    answers: list[Answer] = field(default_factory=list)
    requests: list[httpx2.Request] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    now: float = 1000.0
    latency: float = 0.0  # seconds that each answer takes

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        self.now += self.latency
        return self.answers[len(self.requests) - 1](request)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)

    def call(
        self,
        *answers: Answer,
        method: str = "generate",
        arguments: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Call a method of a client, whose requests get these answers in turn; `options` are the client's."""
        self.answers.extend(answers)
        given = {"label": 1} if arguments is None else arguments
        transport = httpx2.MockTransport(self.handle)
        return self.caller(
            "http://host", lambda c: getattr(c, method)(**given), transport=transport, **options
        )

    @property
    def bodies(self) -> list[Any]:
        return [orjson.loads(request.content) for request in self.requests]


@pytest.fixture
def fake(call: Caller, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    made = FakeServer(call)
    monkeypatch.setattr(retries, "monotonic", lambda: made.now)
    monkeypatch.setattr(retries, "random", lambda: 0.5)
    monkeypatch.setattr(client, "sleep", made.sleep)
    monkeypatch.setattr(aio, "sleep", made.asleep)
    return made
