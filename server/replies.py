"""What an order is answered with: JSON, one image's bytes, or the events of a stream."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.responses import Response

from dd_core.plan import Plan
from server.images import MEDIA_TYPES, Pixels
from server.jobs import Job
from server.orders import Order
from server.schemas import ImageFormat

_VARY = {"vary": "accept"}


def milliseconds(seconds: float) -> float:
    """Seconds as the replies show them."""
    return round(1e3 * seconds, 3)


def timings(job: Job, encode: float, total: float) -> dict[str, float]:
    """Milliseconds that a request waited, computed, encoded and took in all; arguments in seconds."""
    return {
        "queue_ms": milliseconds(job.queue_s),
        "compute_ms": milliseconds(job.compute_s),
        "encode_ms": milliseconds(encode),
        "total_ms": milliseconds(total),
    }


def image_entry(
    order: Order, index: int, pixels: Pixels, file: bytes, image_format: ImageFormat, receipt: str
) -> dict[str, Any]:
    """One image of a JSON reply; `index` is its place in the order."""
    newest = order.origins[index].newest
    return {
        "index": newest.number,
        "seed": newest.seed,
        "format": image_format,
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "receipt": receipt,
        "data": base64.b64encode(file).decode("ascii"),
    }


def facts(order: Order, plan: Plan, identity: str) -> dict[str, Any]:
    """What replies of every form say about an order; `plan` is the one that made the pictures."""
    return {
        "id": identity,
        "model": order.model.name,
        "plan": plan.name,
        "steps": plan.cost,
        "requested_plan": order.choice.requested.plan.name,
        "seed": order.seed,
    }


def json_reply(
    order: Order, identity: str, images: Sequence[dict[str, Any]], times: dict[str, float]
) -> Response:
    """All images in base64."""
    body = {**facts(order, order.plan, identity), "images": images, "timings": times}
    return Response(orjson.dumps(body), media_type="application/json", headers=_VARY)


def raw_reply(
    order: Order,
    identity: str,
    file: bytes,
    image_format: ImageFormat,
    receipt: str,
    times: dict[str, float],
    headers: dict[str, str] | None = None,
) -> Response:
    """The bytes of the one image, with the facts in `X-DD-*` headers."""
    shown = {
        **facts(order, order.plan, identity),
        "index": order.origins[0].newest.number,
        "receipt": receipt,
        **times,
    }
    named = {f"x-dd-{name.replace('_', '-')}": str(value) for name, value in shown.items()}
    return Response(file, media_type=MEDIA_TYPES[image_format], headers={**_VARY, **named, **(headers or {})})


def event(name: str, data: Any) -> bytes:
    """One server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"
