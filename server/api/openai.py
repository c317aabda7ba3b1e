"""`/v1`: OpenAI's images interface in terms of ours, for clients that speak it.

Its fields and what becomes of them: `server.api.openai_fields`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.content import read_json
from server.api.description import ERRORS, errors, event_stream, json_body
from server.api.openai_fields import (
    ImagesReply,
    ImagesRequest,
    Translation,
    Usage,
    check_names,
    quality_of,
    translate,
)
from server.api.responses import ReplyWriter, seed_fields, send
from server.generation.encoder import GeneratedImage
from server.generation.request import check_fields, resolve
from server.generation.runner import GenerationRun
from server.generation.sizes import shown
from server.links import link
from server.observability.record import record_of
from server.state import state_of

router = APIRouter(prefix="/v1", tags=["openai"])

_PARTIAL, _COMPLETED = "image_generation.partial_image", "image_generation.completed"
_USAGE = Usage().model_dump()


@router.post(
    "/images/generations",
    summary="Make images, as OpenAI's clients ask for them",
    response_class=Response,
    responses={
        200: {
            "model": ImagesReply,
            "content": event_stream([_PARTIAL, _COMPLETED, "error"]),
            "description": "JSON; or, with `stream`, server-sent events.",
        },
        **{status: reply for status, reply in ERRORS.items() if status not in (406, 409)},
    },
    openapi_extra=json_body(ImagesRequest, prompt="ship", size="auto", quality="low"),
)
async def generations(request: Request) -> Response:
    """Images of a prompt."""
    server = state_of(request)
    settings = server.settings
    with ExitStack() as owned:
        record = owned.enter_context(record_of(request.scope, server.metrics, settings.log_prompts))
        pool, encoder = server.accepting()
        body = await read_json(request, ImagesRequest, settings.max_body_bytes)
        check_names(body)
        streamed = bool(body.stream)
        model = server.models().find(body.model, by_text=True)
        record.model = model.name
        translation = translate(body, model)
        wanted = translation.wanted
        check_fields(wanted, settings.max_images, streamed=streamed)
        generation = resolve(wanted, model, None, settings, pool.forecast, record.arrived, streamed=streamed)
        record.choose(**generation.logged)
        run = owned.enter_context(GenerationRun(generation, pool, encoder, translation.encoding, record))
        return await send(ImagesWriter(run, body, translation, partial(link, request)), owned)


@dataclass(eq=False)
class ImagesWriter(ReplyWriter):
    """Writes replies as OpenAI's clients read them: a partial image for each preview, a completed one for
    each image.
    """

    request: ImagesRequest
    translation: Translation
    link: Callable[..., Any]  # makes an absolute address of a route and its parameters

    def _common(self) -> dict[str, Any]:
        """Return the fields that replies and events have alike."""
        generation, encoding = self.run.generation, self.run.encoding
        model = generation.model
        return {
            "background": "opaque",
            "output_format": encoding.image_format,
            "quality": quality_of(model, generation.plan.name, self.request.quality),
            "size": shown(encoding.size or model.size),
            "native_size": shown(model.size),
            "warnings": self.translation.warnings,
        }

    def _entry(self, image: GeneratedImage) -> dict[str, Any]:
        ours, encoding = {"receipt": image.receipt, **seed_fields(image.seed)}, self.run.encoding
        if self.translation.by_url:
            form: dict[str, str] = {"format": encoding.image_format}
            if encoding.size is not None:
                form["size"] = shown(encoding.size)
            link = self.link("image", receipt=image.receipt).include_query_params(**form)
            return {"url": str(link), **ours}
        return {"b64_json": base64.b64encode(image.data).decode("ascii"), **ours}

    def body(self, images: Sequence[GeneratedImage]) -> Response:
        """Write an `ImagesReply`."""
        generation = self.run.generation
        reply = {
            "created": int(time.time()),
            "data": [self._entry(image) for image in images],
            **self._common(),
            "usage": _USAGE,
            "model": generation.model.name,
            "plan": generation.plan.name,
            "requested_plan": generation.requested_plan,
            "steps": generation.plan.cost,
        }
        return Response(orjson.dumps(reply), media_type="application/json")

    def event(self, image: GeneratedImage) -> tuple[str, dict[str, Any]]:
        """Write `image_generation.partial_image` or `image_generation.completed`."""
        kind = _COMPLETED if image.final else _PARTIAL
        own = {"usage": _USAGE} if image.final else {"partial_image_index": image.stage}
        return kind, {
            "type": kind,
            "b64_json": base64.b64encode(image.data).decode("ascii"),
            "created_at": int(time.time()),
            **self._common(),
            "receipt": image.receipt,
            **own,
        }


@router.get("/models", summary="The loaded models, as OpenAI lists them", response_class=Response)
async def models(request: Request) -> Response:
    """Names of models, and their aliases."""
    catalog = state_of(request).models()
    entries = [_model(known, name) for name in catalog.models for known in (name, *catalog.aliases_of(name))]
    return Response(orjson.dumps({"object": "list", "data": entries}), media_type="application/json")


@router.get(
    "/models/{name:path}",  # aliases may be of the form `owner/model`
    summary="One loaded model, as OpenAI shows it",
    response_class=Response,
    responses=errors({404: "No model of that name is loaded."}),
)
async def model(request: Request, name: str) -> Response:
    """Its name."""
    if not name:  # `/v1/models/`, which this path has taken from the list
        return await models(request)
    found = state_of(request).models().find(name)
    return Response(orjson.dumps(_model(name, found.name)), media_type="application/json")


def _model(known_as: str, name: str) -> dict[str, Any]:
    # `created` is asked for by the clients' types; a model's age is not known here. `root` is vLLM's.
    return {
        "id": known_as,
        "object": "model",
        "created": 0,
        "owned_by": "distilled-decoding",
        "root": name,
    }
