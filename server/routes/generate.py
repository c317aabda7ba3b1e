"""`POST /generate`: validate → plan → queue → device → encode → reply."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from dd_core.errors import DDError
from dd_core.plan import Plan
from server.catalog import ServedModel
from server.engine import Engine
from server.errors import (
    ApiError,
    BadRequestError,
    DeadlineError,
    DeadlineUnreachableError,
    DrainingError,
    MediaTypeError,
    OutOfMemoryError,
    QueueFullError,
    UnavailableError,
)
from server.facts import note
from server.images import MEDIA_TYPES, Pixels
from server.jobs import Job
from server.metrics import UNKNOWN
from server.negotiation import ReplyForm, negotiate
from server.routes.plain import PlainRoute
from server.schemas import ErrorReply, GenerateReply, GenerateRequest, Priority, parse_generate
from server.state import Phase, ServerState, state_of

router = APIRouter(tags=["generate"], route_class=PlainRoute)

# Seeds that the server draws fit a JavaScript number and are short enough to type.
_DRAWN_SEEDS = 2**32
_PRIORITIES: dict[Priority, int] = {"low": -1, "normal": 0, "high": 1}
_CLIENT_LEFT = 499  # the customary status; nobody reads it
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {
        "model": ErrorReply,
        "description": "The request contradicts the contract; `param` names the field.",
    },
    404: {"model": ErrorReply, "description": "No model of that name is loaded."},
    406: {"model": ErrorReply, "description": "`Accept` admits nothing that can be sent."},
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
_IMAGES: dict[str, Any] = {
    name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES.values()
}


@dataclass
class _Labels:
    """What a request is counted under; filled in as it becomes known."""

    model: str = UNKNOWN
    plan: str = UNKNOWN
    outcome: str = "error"


@router.post(
    "/generate",
    summary="Make images",
    response_class=Response,
    responses={
        200: {
            "model": GenerateReply,
            "content": _IMAGES,
            "description": "JSON with base64, or one image's bytes when `Accept` names an image type "
            "(the facts are then in `X-DD-*` headers).",
        },
        **_ERRORS,
    },
    openapi_extra=_BODY,
)
async def generate(request: Request) -> Response:
    """Images of one class from one seed, with the best plan within the step budget."""
    state = state_of(request)
    arrived: float = request.state.arrived
    labels = _Labels()
    state.metrics.inflight.inc()
    try:
        response = await _generate(request, state, labels, arrived)
        labels.outcome = "canceled" if response.status_code == _CLIENT_LEFT else "ok"
        return response
    except asyncio.CancelledError:
        if state.phase is not Phase.DRAINING:
            labels.outcome = "canceled"
            raise
        labels.outcome = "rejected"
        raise DrainingError("the server shut down before this was done", retry_after=1) from None
    except DDError as error:
        labels.outcome = _outcome(error)
        raise
    finally:
        state.metrics.inflight.dec()
        note(request, model=labels.model, plan=labels.plan, outcome=labels.outcome)
        state.metrics.request(labels.model, labels.plan, labels.outcome, time.perf_counter() - arrived)


def _outcome(error: DDError) -> str:
    if isinstance(error, (QueueFullError, UnavailableError)):
        return "rejected"
    if isinstance(error, (DeadlineError, DeadlineUnreachableError)):
        return "deadline"
    if isinstance(error, OutOfMemoryError):
        return "oom"
    return "error" if isinstance(error, ApiError) and error.status >= 500 else "invalid"


async def _generate(request: Request, state: ServerState, labels: _Labels, arrived: float) -> Response:
    engine, encoder = state.accepting()
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise MediaTypeError("send the body as JSON, with content-type: application/json")
    body = parse_generate(await request.body())
    model = state.models().find(body.model)
    labels.model = model.name
    plan = model.budgets.pick(body.steps).plan
    labels.plan = plan.name
    label = model.condition(body)
    if body.n > state.settings.max_images:
        raise BadRequestError(f"n must be from 1 to {state.settings.max_images}", param="n")
    form = negotiate(request.headers.get("accept"), body.format, body.n)
    seed = secrets.randbelow(_DRAWN_SEEDS) if body.seed is None else body.seed

    deadline = None if body.deadline_ms is None else arrived + body.deadline_ms / 1e3
    priority = _PRIORITIES[body.priority]
    job = Job(model.name, plan, label, seed, body.n, time.perf_counter(), priority, deadline)
    note(request, steps=plan.cost, n=body.n, priority=body.priority)
    pixels = await _pixels_while_connected(request, engine, job)
    note(request, queue_ms=_ms(job.queue_s), compute_ms=_ms(job.compute_s))
    if pixels is None:
        return Response(status_code=_CLIENT_LEFT)
    started = time.perf_counter()
    files = await encoder.encode_all(pixels, form.image_format)
    encoded = time.perf_counter()
    state.metrics.encode[form.image_format].observe(encoded - started)
    state.metrics.delivered(model.name, plan.name, len(files))
    timings = {
        "queue_ms": _ms(job.queue_s),
        "compute_ms": _ms(job.compute_s),
        "encode_ms": _ms(encoded - started),
        "total_ms": _ms(encoded - arrived),
    }
    identity = request.state.request_id
    if form.raw:
        return _raw_reply(identity, model, plan, seed, files[0], form, timings)
    return _json_reply(identity, model, plan, seed, files, pixels, form, timings)


async def _pixels_while_connected(request: Request, engine: Engine, job: Job) -> list[Pixels] | None:
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


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def _json_reply(
    identity: str,
    model: ServedModel,
    plan: Plan,
    seed: int,
    files: list[bytes],
    pixels: list[Pixels],
    form: ReplyForm,
    timings: dict[str, float],
) -> Response:
    images = [
        {
            "index": index,
            "seed": seed,
            "format": form.image_format,
            "width": image.shape[1],
            "height": image.shape[0],
            "data": base64.b64encode(file).decode("ascii"),
        }
        for index, (file, image) in enumerate(zip(files, pixels, strict=True))
    ]
    reply = {
        "id": identity,
        "model": model.name,
        "plan": plan.name,
        "steps": plan.cost,
        "seed": seed,
        "images": images,
        "timings": timings,
    }
    return Response(orjson.dumps(reply), media_type="application/json", headers={"vary": "accept"})


def _raw_reply(
    identity: str,
    model: ServedModel,
    plan: Plan,
    seed: int,
    file: bytes,
    form: ReplyForm,
    timings: dict[str, float],
) -> Response:
    facts: dict[str, object] = {
        "id": identity,
        "model": model.name,
        "plan": plan.name,
        "steps": plan.cost,
        "seed": seed,
        "index": 0,
        **{name.replace("_", "-"): value for name, value in timings.items()},
    }
    headers = {f"x-dd-{name}": str(value) for name, value in facts.items()}
    return Response(file, media_type=MEDIA_TYPES[form.image_format], headers={"vary": "accept", **headers})
