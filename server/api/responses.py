"""What an order is answered with: JSON, one image's bytes, or the events of a stream."""

from __future__ import annotations

import base64
from typing import Any

import orjson
from starlette.responses import Response

from dd_core.plan import Plan
from distilled_decoding.contract import ImageFormat
from server.generation.encoder import MEDIA_TYPES
from server.generation.pictures import File, Made
from server.generation.request import Order

_VARY = {"vary": "accept"}


def image_entry(order: Order, file: File, image_format: ImageFormat) -> dict[str, Any]:
    """One image of a JSON reply."""
    newest = order.keys[file.index].newest
    return {
        "index": newest.index,
        "seed": newest.seed,
        "format": image_format,
        "width": file.width,
        "height": file.height,
        "receipt": file.receipt,
        "data": base64.b64encode(file.data).decode("ascii"),
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


def json_reply(order: Order, identity: str, made: Made, image_format: ImageFormat) -> Response:
    """All images in base64."""
    images = [image_entry(order, file, image_format) for file in made.files]
    body = {**facts(order, order.plan, identity), "images": images, "timings": made.times}
    return Response(orjson.dumps(body), media_type="application/json", headers=_VARY)


def raw_reply(order: Order, identity: str, made: Made, image_format: ImageFormat) -> Response:
    """The bytes of the one image, with the facts in `X-DD-*` headers."""
    [file] = made.files
    known = facts(order, order.plan, identity)
    shown = {**known, "index": order.keys[0].newest.index, "receipt": file.receipt, **made.times}
    headers = {f"x-dd-{name.replace('_', '-')}": str(value) for name, value in shown.items()}
    return Response(file.data, media_type=MEDIA_TYPES[image_format], headers={**_VARY, **headers})


def event(name: str, data: Any) -> bytes:
    """One server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"
