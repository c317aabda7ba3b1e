"""`POST /generate`: validate → order → plan → queue → device → encode → reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from dd_core.errors import DDError
from server.accounts import Account, accounted
from server.engine import Engine
from server.errors import MediaTypeError, error_body, internal_body
from server.facts import note
from server.images import MEDIA_TYPES, Encoder, Pixels
from server.jobs import Job
from server.negotiation import ReplyForm, negotiate
from server.orders import Order, addressed, place
from server.parsing import parse_generate
from server.refine import Refinement, rungs
from server.replies import event, facts, image_entry, json_reply, milliseconds, raw_reply, timings
from server.schemas import DoneEvent, ErrorReply, GenerateReply, GenerateRequest, ImageEvent
from server.state import state_of
from server.streams import EventStream

log = logging.getLogger("dd_server")
router = APIRouter(tags=["generate"])

CLIENT_LEFT = 499  # the customary status; nobody reads it
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
    with accounted(request, state) as account:
        engine, encoder = state.accepting()
        check_json(request)
        body = parse_generate(await request.body())
        form = negotiate(request.headers.get("accept"), body.format, body.n)
        model, receipt = addressed(body, state, stream=form.stream)
        account.addressed(model.name)
        order = place(body, model, receipt, state.settings, engine, account.arrived, stream=form.stream)
        account.ordered(order)
        note(request, priority=body.priority)
        if form.stream:
            refinement = begin_refinement(engine, order, body.partial_images)
            account.lasting = True
            return EventStream(_events(request.state.request_id, account, encoder, order, refinement, form))
        return await fulfil(request, account, engine, encoder, order, form)


def check_json(request: Request) -> None:
    """Raises MediaTypeError where the body is declared to be something other than JSON."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise MediaTypeError("send the body as JSON, with content-type: application/json")


async def fulfil(
    request: Request,
    account: Account,
    engine: Engine,
    encoder: Encoder,
    order: Order,
    form: ReplyForm,
    headers: dict[str, str] | None = None,
) -> Response:
    """Make the images of an order and answer in one piece; `headers` go onto a raw reply."""
    job = order.job(order.plan)
    pixels = await pixels_while_connected(request, engine, job)
    note(request, queue_ms=milliseconds(job.queue_s), compute_ms=milliseconds(job.compute_s))
    if pixels is None:
        account.outcome = "canceled"
        return Response(status_code=CLIENT_LEFT)
    started = time.perf_counter()
    receipts = [order.receipt(index, order.plan) for index in range(len(pixels))]
    files = await encoder.encode_all(pixels, form.image_format, receipts)
    encoded = time.perf_counter()
    state_of(request).metrics.encode[form.image_format].observe(encoded - started)
    account.delivered(order.plan.name, len(files))
    account.outcome = "ok"
    identity = request.state.request_id
    times = timings(job, encoded - started, encoded - account.arrived)
    if form.raw:
        return raw_reply(order, identity, files[0], form.image_format, receipts[0], times, headers)
    images = [
        image_entry(order, index, picture, file, form.image_format, receipt)
        for index, (picture, file, receipt) in enumerate(zip(pixels, files, receipts, strict=True))
    ]
    return json_reply(order, identity, images, times)


async def pixels_while_connected(request: Request, engine: Engine, job: Job) -> list[Pixels] | None:
    """The job's images, or None if the client leaves first: then nothing more is computed for it."""
    answer = engine.submit(job)
    left = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        left.cancel()
        engine.cancel(job)
        answer.cancel()


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def begin_refinement(engine: Engine, order: Order, previews: int | None) -> Refinement:
    """The stream of an order, whose first pass waits already: what is refused is refused with its status."""
    refinement = Refinement(engine, order, rungs(order.model.budgets.ladder, order.plan, previews))
    refinement.begin()
    return refinement


async def _events(
    identity: str,
    account: Account,
    encoder: Encoder,
    order: Order,
    refinement: Refinement,
    form: ReplyForm,
) -> AsyncGenerator[bytes, None]:
    """An `image` event for each picture, then `done`; or `error`, for what goes wrong on the way."""
    try:
        with account.watched():
            async for picture in refinement.pictures():
                started = time.perf_counter()
                receipt = order.receipt(picture.index, picture.plan)
                [file] = await encoder.encode_all([picture.pixels], form.image_format, [receipt])
                encoded = time.perf_counter()
                account.pictured(picture.plan.name, form.image_format, encoded - started)
                entry = image_entry(order, picture.index, picture.pixels, file, form.image_format, receipt)
                yield event(
                    "image",
                    {
                        **facts(order, picture.plan, identity),
                        "stage": picture.stage,
                        "final": picture.final,
                        "image": entry,
                        "timings": timings(picture.job, encoded - started, encoded - account.arrived),
                    },
                )
            account.outcome = "ok"
            total = milliseconds(time.perf_counter() - account.arrived)
            yield event("done", {"id": identity, "images": len(order.origins), "total_ms": total})
    except DDError as error:
        yield event("error", error_body(error))
    except Exception:
        log.exception("request %s: its stream failed", identity)
        yield event("error", internal_body())
    finally:
        refinement.end()
        account.close()
