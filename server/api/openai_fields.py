"""OpenAI's images interface in terms of ours: its fields, and what they mean here.

Field by field as OpenAI's clients send and read them; what cannot be honoured is refused with the valid
choices rather than ignored. `seed` is ours.
"""

from __future__ import annotations

import base64
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from distilled_decoding.contract import MAX_SEED, GenerateRequest, ImageFormat, Quality
from server.errors import BadRequestError
from server.generation.encoder import QUALITY
from server.generation.pictures import File, Form
from server.models.catalog import ServedModel

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
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="As of `POST /generate`; not OpenAI's.")
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
    """Whether the model can make what is asked for.

    Raises:
        BadRequestError: another size than its own; a compression that the format does not have.
    """
    own = size_of(model)
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
    """The same as a request to `POST /generate`.

    Raises:
        BadRequestError: the prompt names no class of a model that is conditioned on classes.
    """
    label, prompt = None, None
    if model.manifest.reads_text:
        prompt = body.prompt
    else:
        try:
            label = model.labels.find(body.prompt)
        except BadRequestError as error:
            raise BadRequestError(f"prompt: {error.message}", param="prompt") from None
    quality = body.quality or "auto"
    return GenerateRequest(
        label=label,
        prompt=prompt,
        model=model.name,
        n=body.n or 1,
        seed=body.seed,
        quality=_QUALITIES.get(quality, quality),  # type: ignore[arg-type]
        format=body.output_format or "png",
        partial_images=(body.partial_images or 0) if body.stream else None,
    )


def form_of(body: ImagesRequest) -> Form:
    """How the images are encoded."""
    chosen = body.output_compression
    return Form(body.output_format or "png", QUALITY if chosen is None else chosen)


def size_of(model: ServedModel) -> str:
    """The size of a model's images, as OpenAI writes it."""
    return f"{model.manifest.image_size}x{model.manifest.image_size}"


def common(body: ImagesRequest, model: ServedModel) -> dict[str, Any]:
    """What replies and events say alike."""
    return {
        "background": "opaque",
        "output_format": body.output_format or "png",
        "quality": body.quality or "auto",
        "size": size_of(model),
    }


def event_of(kind: str, body: ImagesRequest, model: ServedModel, file: File) -> dict[str, Any]:
    """The data of `image_generation.partial_image` and `image_generation.completed`."""
    return {
        "type": kind,
        "b64_json": base64.b64encode(file.data).decode("ascii"),
        "created_at": int(time.time()),
        **common(body, model),
        "receipt": file.receipt,
    }
