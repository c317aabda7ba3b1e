"""`/v1`: OpenAI's images interface, for clients that speak it."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from distilled_decoding.contract import ErrorReply
from server.api import openai_fields as openai
from server.api.generate import ERRORS
from server.api.openai_fields import ImagesReply, ImagesRequest
from server.api.parsing import parse
from server.api.responses import event
from server.generation.encoder import Encoder
from server.generation.making import begin_refinement, check_json, files_of, make, streamed
from server.generation.pictures import File
from server.generation.request import Order, check_fields, place
from server.generation.runner import Refinement
from server.observability.logs import CLIENT_LEFT
from server.observability.record import RequestRecord, open_record
from server.state import state_of

router = APIRouter(prefix="/v1", tags=["openai"])

_PARTIAL, _COMPLETED = "image_generation.partial_image", "image_generation.completed"
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": ImagesRequest.model_json_schema(),
                "example": {"prompt": "ship", "size": "auto", "quality": "low"},
            }
        },
    }
}
_EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "required": ["event", "data"],
            "properties": {
                "event": {"enum": [_PARTIAL, _COMPLETED, "error"]},
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
        }
    }
}


@router.post(
    "/images/generations",
    summary="Make images, as OpenAI's clients ask for them",
    response_class=Response,
    responses={
        200: {
            "model": ImagesReply,
            "content": _EVENTS,
            "description": "JSON; or, with `stream`, server-sent events.",
        },
        **{status: reply for status, reply in ERRORS.items() if status not in (406, 409)},
    },
    openapi_extra=_BODY,
)
async def generations(request: Request) -> Response:
    """Images of a prompt."""
    state = state_of(request)
    with open_record(request, state) as account:
        engine, encoder = state.accepting()
        check_json(request)
        body = parse(ImagesRequest, await request.body())
        model = state.models().find(body.model, by_text=True)
        account.addressed(model.name)
        openai.check_for(body, model)
        wanted = openai.translated(body, model)
        check_fields(wanted, state.settings.max_images, stream=bool(body.stream))
        order = place(wanted, model, None, state.settings, engine, account.arrived, stream=bool(body.stream))
        account.ordered(order)
        form = openai.form_of(body)
        if body.stream:
            refinement = begin_refinement(account, engine, order)
            events = _events(account, encoder, body, order, refinement)
            return streamed(request, account, refinement, events)
        made = await make(request, account, engine, encoder, order, form)
    if made is None:
        return Response(status_code=CLIENT_LEFT)
    reply = {
        "created": int(time.time()),
        "data": [_entry(request, body, order, file) for file in made.files],
        **openai.common(body, model),
        "model": model.name,
        "plan": order.plan.name,
        "requested_plan": order.choice.requested.plan.name,
        "steps": order.plan.cost,
    }
    return Response(orjson.dumps(reply), media_type="application/json")


@router.get("/models", summary="The loaded models, as OpenAI lists them", response_class=Response)
async def models(request: Request) -> Response:
    """Names of models."""
    entries = [_model(name) for name in state_of(request).models().models]
    return Response(orjson.dumps({"object": "list", "data": entries}), media_type="application/json")


@router.get(
    "/models/{name}",
    summary="One loaded model, as OpenAI shows it",
    response_class=Response,
    responses={404: {"model": ErrorReply, "description": "No model of that name is loaded."}},
)
async def model(request: Request, name: str) -> Response:
    """Its name."""
    found = state_of(request).models().find(name)
    return Response(orjson.dumps(_model(found.name)), media_type="application/json")


def _model(name: str) -> dict[str, Any]:
    # `created` is asked for by the clients' types; a model's age is not known here.
    return {"id": name, "object": "model", "created": 0, "owned_by": "distilled-decoding"}


def _entry(request: Request, body: ImagesRequest, order: Order, file: File) -> dict[str, Any]:
    ours = {"receipt": file.receipt, "seed": order.keys[file.index].newest.seed}
    if body.response_format == "url":
        link = request.url_for("image", receipt=file.receipt)
        return {"url": str(link.include_query_params(format=body.output_format or "png")), **ours}
    return {"b64_json": base64.b64encode(file.data).decode("ascii"), **ours}


async def _events(
    account: RequestRecord, encoder: Encoder, body: ImagesRequest, order: Order, refinement: Refinement
) -> AsyncIterator[bytes]:
    """A partial image for each preview, a completed one for each image."""
    async for picture, file, _ in files_of(refinement, account, encoder, order, openai.form_of(body)):
        kind = _COMPLETED if picture.final else _PARTIAL
        data = openai.event_of(kind, body, order.model, file)
        if not picture.final:
            data["partial_image_index"] = picture.stage
        yield event(kind, data)
