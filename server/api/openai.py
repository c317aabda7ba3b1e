"""`/v1`: OpenAI's images interface in terms of ours, for clients that speak it.

Field by field as OpenAI's clients send and read them; what cannot be honoured is refused with the valid
choices rather than ignored. `seed` and `plan` are ours.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from distilled_decoding.contract import GenerateRequest, ImageFormat, Quality, Seed
from server.api.content import read_json
from server.api.description import ERRORS, errors, event_stream, json_body
from server.api.responses import ReplyWriter, seed_fields, send
from server.errors import BadRequestError
from server.generation.encoder import QUALITY, Encoding, GeneratedImage
from server.generation.request import check_fields, resolve
from server.generation.runner import GenerationRun
from server.links import link
from server.models.catalog import ServedModel
from server.observability.record import record_of
from server.state import state_of

router = APIRouter(prefix="/v1", tags=["openai"])

_PARTIAL, _COMPLETED = "image_generation.partial_image", "image_generation.completed"
_QUALITIES: dict[str, Quality] = {"standard": "medium", "hd": "high"}


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(
        description="Text; for a model that is conditioned on classes, the name of a class.", min_length=1
    )
    model: str | None = Field(None, description="Name of a loaded model, as `GET /v1/models` lists them.")
    n: int | None = Field(1, ge=1, description="Number of images, up to the server's limit.")
    size: str | None = Field("auto", description="`auto`, or the model's own size, as `32x32`.")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        "auto", description="How many passes to spend: as `quality` of `POST /generate`."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        "b64_json", description="`url` is a link to `GET /images/{receipt}`."
    )
    output_format: ImageFormat | None = Field("png", description="`png`, `jpeg` or `webp`.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP, 0 to 100."
    )
    background: Literal["auto", "opaque"] | None = Field("auto", description="Images are opaque.")
    stream: bool | None = Field(False, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With `stream`: previews of an image before the final one."
    )
    seed: Seed = Field(None, description="As of `POST /generate`; not OpenAI's.")
    plan: str | None = Field(None, description="As of `POST /generate`, instead of `quality`; not OpenAI's.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted; there is no moderation.")
    style: str | None = Field(None, description="Accepted; models here have no such choice.")
    user: str | None = Field(None, description="Accepted, and not recorded.")


class ImagesReply(BaseModel):
    """The reply of `POST /v1/images/generations`."""

    created: int
    data: list[dict[str, Any]] = Field(
        description="For each image `b64_json` or `url`, and our `receipt` and `seed`."
    )
    background: Literal["opaque"]
    output_format: ImageFormat
    quality: str = Field(description="As asked for.")
    size: str
    model: str
    plan: str = Field(description="The sampler that was applied.")
    requested_plan: str
    steps: int


def check_for(body: ImagesRequest, model: ServedModel) -> None:
    """Check that the model can make what is asked for.

    Raises:
        BadRequestError: another size than its own; a compression that the format does not have.
    """
    own = _size(model)
    if body.size not in (None, "auto", own):
        raise BadRequestError(f"size must be auto or {own} for {model.name}", param="size")
    if body.output_compression is not None:
        if (body.output_format or "png") == "png" and body.output_compression != 100:
            raise BadRequestError(
                "output_compression is for jpeg and webp: png loses nothing", param="output_compression"
            )
        if body.response_format == "url":
            raise BadRequestError(
                "output_compression goes with b64_json: the file behind a url has one form only",
                param="output_compression",
            )
    if body.partial_images and not body.stream:
        raise BadRequestError("partial_images needs stream", param="partial_images")
    if body.stream and body.response_format == "url":
        raise BadRequestError("a stream sends b64_json", param="response_format")


def translated(body: ImagesRequest, model: ServedModel) -> GenerateRequest:
    """Translate into a request to `POST /generate`.

    Raises:
        BadRequestError: the prompt names no class of a model that is conditioned on classes.
    """
    try:
        label = None if model.manifest.reads_text else model.labels.find(body.prompt)
    except BadRequestError as error:
        raise BadRequestError(f"prompt: {error.message}", param="prompt") from None
    # OpenAI's clients may send their default.
    quality = None if body.plan is not None and body.quality in (None, "auto") else body.quality or "auto"
    return GenerateRequest(
        label=label,
        prompt=body.prompt if label is None else None,
        model=model.name,
        n=body.n or 1,
        seed=body.seed,
        quality=_QUALITIES.get(quality or "", quality),  # type: ignore[arg-type]
        plan=body.plan,
        format=body.output_format or "png",
        partial_images=(body.partial_images or 0) if body.stream else None,
    )


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
        streamed = bool(body.stream)
        model = server.models().find(body.model, by_text=True)
        record.model = model.name
        check_for(body, model)
        wanted = translated(body, model)
        check_fields(wanted, settings.max_images, streamed=streamed)
        generation = resolve(wanted, model, None, settings, pool.forecast, record.arrived, streamed=streamed)
        record.choose(**generation.logged)
        chosen = body.output_compression
        encoding = Encoding(body.output_format or "png", QUALITY if chosen is None else chosen)
        run = owned.enter_context(GenerationRun(generation, pool, encoder, encoding, record))
        return await send(ImagesWriter(run, body, partial(link, request)), owned)


@dataclass(eq=False)
class ImagesWriter(ReplyWriter):
    """Writes replies as OpenAI's clients read them: a partial image for each preview, a completed one for
    each image.
    """

    request: ImagesRequest
    link: Callable[..., Any]  # makes an absolute address of a route and its parameters

    def _common(self) -> dict[str, Any]:
        """Return the fields that replies and events have alike."""
        return {
            "background": "opaque",
            "output_format": self.run.encoding.image_format,
            "quality": self.request.quality or "auto",
            "size": _size(self.run.generation.model),
        }

    def _entry(self, image: GeneratedImage) -> dict[str, Any]:
        ours = {"receipt": image.receipt, **seed_fields(image.seed)}
        if self.request.response_format == "url":
            link = self.link("image", receipt=image.receipt)
            return {"url": str(link.include_query_params(format=self.run.encoding.image_format)), **ours}
        return {"b64_json": base64.b64encode(image.data).decode("ascii"), **ours}

    def body(self, images: Sequence[GeneratedImage]) -> Response:
        """Write an `ImagesReply`."""
        generation = self.run.generation
        reply = {
            "created": int(time.time()),
            "data": [self._entry(image) for image in images],
            **self._common(),
            "model": generation.model.name,
            "plan": generation.plan.name,
            "requested_plan": generation.requested_plan,
            "steps": generation.plan.cost,
        }
        return Response(orjson.dumps(reply), media_type="application/json")

    def event(self, image: GeneratedImage) -> tuple[str, dict[str, Any]]:
        """Write `image_generation.partial_image` or `image_generation.completed`."""
        kind = _COMPLETED if image.final else _PARTIAL
        partial = {} if image.final else {"partial_image_index": image.stage}
        return kind, {
            "type": kind,
            "b64_json": base64.b64encode(image.data).decode("ascii"),
            "created_at": int(time.time()),
            **self._common(),
            "receipt": image.receipt,
            **partial,
        }


def _size(model: ServedModel) -> str:
    """Return the size of a model's images, as OpenAI writes it."""
    return f"{model.manifest.image_size}x{model.manifest.image_size}"


@router.get("/models", summary="The loaded models, as OpenAI lists them", response_class=Response)
async def models(request: Request) -> Response:
    """Names of models."""
    entries = [_model(name) for name in state_of(request).models().models]
    return Response(orjson.dumps({"object": "list", "data": entries}), media_type="application/json")


@router.get(
    "/models/{name}",
    summary="One loaded model, as OpenAI shows it",
    response_class=Response,
    responses=errors({404: "No model of that name is loaded."}),
)
async def model(request: Request, name: str) -> Response:
    """Its name."""
    found = state_of(request).models().find(name)
    return Response(orjson.dumps(_model(found.name)), media_type="application/json")


def _model(name: str) -> dict[str, Any]:
    # `created` is asked for by the clients' types; a model's age is not known here.
    return {"id": name, "object": "model", "created": 0, "owned_by": "distilled-decoding"}
