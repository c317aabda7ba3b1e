"""Send what a run makes: as one body when all of it is there, or as a stream of events.

A stream is sent by sse-starlette, with pings for proxies that close silent connections. Nothing here
watches for a client that leaves: `server.middleware.connection` cancels the request's task.
"""

from __future__ import annotations

import base64
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import orjson
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dd_core.errors import DDError
from dd_core.plan import Plan
from server.errors import error_body
from server.generation.encoder import MEDIA_TYPES, GeneratedImage
from server.generation.runner import GenerationRun

log = logging.getLogger("dd_server")

# Streams that run at SIGTERM get the time to end that all requests get.
AppStatus.enable_automatic_graceful_drain = False
# Seconds between the comments that keep a stream open while it waits: proxies and balancers close a
# connection that is silent for 30 or 60 s.
PING_SECONDS = 10.0
_VARY = {"vary": "accept"}
_LINE_END = "\n"


@dataclass(eq=False)
class ReplyWriter(ABC):
    """Writes the images of a run in the form of one interface."""

    run: GenerationRun

    @abstractmethod
    def body(self, images: Sequence[GeneratedImage]) -> Response:
        """Write all images as one reply."""

    @abstractmethod
    def event(self, image: GeneratedImage) -> tuple[str, dict[str, Any]]:
        """Write one image of a stream as the name and the data of an event."""

    def end(self) -> tuple[str, dict[str, Any]] | None:
        """Write the event that ends a stream, if there is one."""
        return None


async def send(writer: ReplyWriter, owned: ExitStack) -> Response:
    """Return the reply to a request with the images of the writer's run.

    Args:
        owned: what ends with the reply; a stream takes it over from the caller's `with`.

    Raises:
        ApiError: the run fails before the first byte of its reply.
    """
    if writer.run.generation.streamed:
        return EventReply(_events(writer), owned.pop_all())
    return writer.body([image async for image in writer.run])


class EventReply(EventSourceResponse):
    """A stream of events that closes what it owns at its end, also where no event was ever asked for."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], owned: ExitStack) -> None:
        super().__init__(events, headers=_VARY, sep=_LINE_END, ping=PING_SECONDS, ping_message_factory=_ping)
        self._owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._owned:
            await super().__call__(scope, receive, send)


async def _events(writer: ReplyWriter) -> AsyncIterator[ServerSentEvent]:
    """Yield an event for each image and the last one; what goes wrong on the way is an `error` event."""
    try:
        async for image in writer.run:
            yield _event(*writer.event(image))
        if (last := writer.end()) is not None:
            yield _event(*last)
    except Exception as error:  # the reply has begun, so the last resort could not answer any more
        writer.run.record.failed(error)
        if not isinstance(error, DDError):
            log.exception("request %s: its stream failed", writer.run.record.request_id)
        yield _event("error", error_body(error))


def _ping() -> ServerSentEvent:
    """Make a comment, which clients pass over."""
    return ServerSentEvent(comment="waiting", sep=_LINE_END)


def _event(name: str, data: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(orjson.dumps(data).decode(), event=name, sep=_LINE_END)


@dataclass(eq=False)
class GenerateWriter(ReplyWriter):
    """Writes replies of `POST /generate` and `GET /images`: JSON, the bytes of one image, or events."""

    raw: bool  # one image's bytes, with everything else in `X-DD-*` headers

    def _common(self, plan: Plan) -> dict[str, Any]:
        """Return the fields that replies of every form have; `plan` is the one that made the images."""
        generation = self.run.generation
        return {
            "id": self.run.record.request_id,
            "model": generation.model.name,
            "plan": plan.name,
            "steps": plan.cost,
            "requested_plan": generation.requested_plan,
            "seed": generation.seed,
        }

    def _entry(self, image: GeneratedImage) -> dict[str, Any]:
        return {
            "index": image.number,
            "seed": image.seed,
            "format": self.run.encoding.image_format,
            "width": image.width,
            "height": image.height,
            "receipt": image.receipt,
            "data": base64.b64encode(image.data).decode("ascii"),
        }

    def body(self, images: Sequence[GeneratedImage]) -> Response:
        """Write all images in base64, or the bytes of the one image."""
        common = self._common(self.run.generation.plan)
        if not self.raw:
            entries = [self._entry(image) for image in images]
            reply = orjson.dumps({**common, "images": entries, "timings": images[-1].timings})
            return Response(reply, media_type="application/json", headers=_VARY)
        [image] = images
        fields = {**common, "index": image.number, "receipt": image.receipt, **image.timings}
        headers = {f"x-dd-{name.replace('_', '-')}": str(value) for name, value in fields.items()}
        media_type = MEDIA_TYPES[self.run.encoding.image_format]
        return Response(image.data, media_type=media_type, headers={**_VARY, **headers})

    def event(self, image: GeneratedImage) -> tuple[str, dict[str, Any]]:
        """Write an `image` event."""
        return "image", {
            **self._common(image.plan),
            "stage": image.stage,
            "final": image.final,
            "image": self._entry(image),
            "timings": image.timings,
        }

    def end(self) -> tuple[str, dict[str, Any]]:
        """Write the `done` event."""
        record, images = self.run.record, len(self.run.generation.keys)
        total = round(1e3 * (time.perf_counter() - record.arrived), 3)
        return "done", {"id": record.request_id, "images": images, "total_ms": total}
