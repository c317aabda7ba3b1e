"""`POST /generate`: validate → order → plan → queue → device → encode → reply."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from distilled_decoding.contract import DoneEvent, ErrorReply, GenerateReply, GenerateRequest, ImageEvent
from server.api.content import negotiate
from server.api.parsing import parse_generate
from server.api.responses import event, facts, image_entry, json_reply, raw_reply
from server.generation.encoder import MEDIA_TYPES, Encoder
from server.generation.making import begin_refinement, check_json, files_of, make, streamed
from server.generation.pictures import Form, milliseconds
from server.generation.request import Order, addressed, place
from server.generation.runner import Refinement
from server.observability.context import bind
from server.observability.logs import CLIENT_LEFT
from server.observability.record import RequestRecord, open_record
from server.state import state_of

router = APIRouter(tags=["generate"])

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {
        "model": ErrorReply,
        "description": "The request contradicts the contract; `param` names the field.",
    },
    404: {"model": ErrorReply, "description": "No model of that name is loaded."},
    406: {"model": ErrorReply, "description": "`Accept` admits nothing that can be sent."},
    409: {"model": ErrorReply, "description": "A receipt of weights or of a plan that are not here."},
    413: {"model": ErrorReply, "description": "The body is too long."},
    415: {"model": ErrorReply, "description": "The body is not declared as JSON."},
    429: {"model": ErrorReply, "description": "The queue is full; `Retry-After` says for how long."},
    500: {"model": ErrorReply, "description": "The device failed on this request."},
    503: {
        "model": ErrorReply,
        "description": "Not ready, shutting down, or too busy for the request's `deadline_ms`.",
    },
    504: {"model": ErrorReply, "description": "`deadline_ms` passed before the images were done."},
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": GenerateRequest.model_json_schema(),
                "example": {"label": "ship", "seed": 7, "steps": 1},
            }
        },
    }
}
IMAGES: dict[str, Any] = {
    name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES.values()
}
_EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "Events `image`, then one `done` or `error`.",
            "required": ["event", "data"],
            "properties": {
                "event": {"enum": ["image", "done", "error"]},
                "data": {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "description": f"Of `image`: {', '.join(ImageEvent.model_fields)}. Of `done`: "
                    f"{', '.join(DoneEvent.model_fields)}. Of `error`: as in every error.",
                },
            },
        }
    }
}


@router.post(
    "/generate",
    summary="Make images",
    response_class=Response,
    responses={
        200: {
            "model": GenerateReply,
            "content": {**IMAGES, **_EVENTS},
            "description": "JSON with base64; or one image's bytes when `Accept` names an image type "
            "(the facts are then in `X-DD-*` headers); or, for `text/event-stream`, pictures as they come.",
        },
        **ERRORS,
    },
    openapi_extra=_BODY,
)
async def generate(request: Request) -> Response:
    """Images of one class from one seed, with the best plan within the budget; or of a receipt."""
    state = state_of(request)
    with open_record(request, state) as account:
        engine, encoder = state.accepting()
        check_json(request)
        body = parse_generate(await request.body())
        form = negotiate(request.headers.get("accept"), body.format, body.n)
        model, receipt = addressed(body, state, stream=form.stream)
        account.addressed(model.name)
        order = place(body, model, receipt, state.settings, engine, account.arrived, stream=form.stream)
        account.ordered(order)
        bind(request, priority=body.priority)
        encoding = Form(form.image_format)
        if form.stream:
            refinement = begin_refinement(account, engine, order)
            events = _events(request.state.request_id, account, encoder, order, refinement, encoding)
            return streamed(request, account, refinement, events)
        made = await make(request, account, engine, encoder, order, encoding)
        if made is None:
            return Response(status_code=CLIENT_LEFT)
        reply = raw_reply if form.raw else json_reply
        return reply(order, request.state.request_id, made, form.image_format)


async def _events(
    identity: str, account: RequestRecord, encoder: Encoder, order: Order, refinement: Refinement, form: Form
) -> AsyncIterator[bytes]:
    """An `image` event for each picture, then `done`."""
    async for picture, file, times in files_of(refinement, account, encoder, order, form):
        data = {
            **facts(order, picture.plan, identity),
            "stage": picture.stage,
            "final": picture.final,
            "image": image_entry(order, file, form.image_format),
            "timings": times,
        }
        yield event("image", data)
    total = milliseconds(time.perf_counter() - account.arrived)
    yield event("done", {"id": identity, "images": len(order.keys), "total_ms": total})
