"""`POST /generate`: read the body → resolve → start → send."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter, Request
from starlette.responses import Response

from distilled_decoding.contract import DoneEvent, GenerateReply, GenerateRequest, ImageEvent
from server.api.content import negotiate, read_json
from server.api.description import ERRORS, IMAGES, event_stream, json_body
from server.api.responses import GenerateWriter, send
from server.generation.encoder import Encoding
from server.generation.request import resolve, resolve_model
from server.generation.runner import GenerationRun
from server.observability.record import record_of
from server.state import state_of

router = APIRouter(tags=["generate"])

_EVENTS = event_stream(
    ["image", "done", "error"],
    "Events `image`, then one `done` or `error`.",
    f"Of `image`: {', '.join(ImageEvent.model_fields)}. Of `done`: {', '.join(DoneEvent.model_fields)}. "
    "Of `error`: as in every error.",
)


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
    openapi_extra=json_body(GenerateRequest, label="ship", seed=7, steps=1),
)
async def generate(request: Request) -> Response:
    """Images of one class or prompt from one seed, with the best plan within the budget; or of a receipt."""
    server = state_of(request)
    settings = server.settings
    with ExitStack() as owned:
        record = owned.enter_context(record_of(request.scope, server.metrics, settings.log_prompts))
        pool, encoder = server.accepting()
        body = await read_json(request, GenerateRequest, settings.max_body_bytes)
        form = negotiate(request.headers.get("accept"), body.format, body.n)
        model, redeemed = resolve_model(body, server.models(), settings.max_images, streamed=form.stream)
        record.model = model.name
        generation = resolve(
            body, model, redeemed, settings, pool.forecast, record.arrived, streamed=form.stream
        )
        record.choose(**generation.logged, priority=body.priority)
        encoding = Encoding(form.image_format)
        run = owned.enter_context(GenerationRun(generation, pool, encoder, encoding, record))
        return await send(GenerateWriter(run, raw=form.raw), owned)
