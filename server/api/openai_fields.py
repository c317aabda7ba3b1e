"""The fields of OpenAI's images interface, and those that clients of vLLM-Omni and SGLang add to them.

Clients of other servers work unchanged: what has a meaning here is translated, what has none is accepted
and named in the reply's `warnings`. A field that nobody sends is a typing mistake, and refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from dd_core.text.encoder import MAX_CHARACTERS
from distilled_decoding.contract import LOSSLESS, QUALITY, GenerateRequest, ImageFormat, Quality, Seed
from server.errors import BadRequestError, shortened
from server.generation.encoder import Encoding
from server.generation.sizes import MAX_SIDE, parse_size
from server.models.catalog import ServedModel

# Fields of other servers that change nothing here, by the reason. Their values are not looked at.
NO_EFFECT: dict[str, tuple[str, ...]] = {
    "guidance is a part of each plan": (
        "guidance_scale", "true_cfg_scale", "negative_prompt",
    ),
    "models here have no such choice": (
        "style", "bot_task", "complexity", "diffusers_kwargs", "extra_params", "flow_shift", "layers", "lora",
        "max_sequence_length", "prompt_rewriter", "system_prompt", "use_system_prompt",
    ),
    "the server decides how an image is computed": (
        "enable_teacache", "generator_device", "infer_align_image_size", "perf_dump_path",
        "progressive_delta", "progressive_levels", "progressive_mode", "vae_use_slicing", "vae_use_tiling",
    ),
    "pictures are resampled to size": ("enable_upscaling", "upscaling_model_path", "upscaling_scale"),
    "output_compression is the quality of a file": ("output_quality",),
    "there is no moderation": ("moderation",),
    "it is not recorded": ("safety_identifier", "user"),
}  # fmt: skip
_REASONS = {name: reason for reason, names in NO_EFFECT.items() for name in names}
_QUALITIES: dict[str, Quality] = {
    "auto": "auto", "low": "low", "medium": "medium", "high": "high",
    "standard": "medium", "hd": "high", "xhigh": "high", "max": "high",
}  # fmt: skip


def _with_no_effect(schema: dict[str, Any]) -> None:
    """Describe the fields that are accepted for the sake of other servers' clients."""
    others = {
        name: {"deprecated": True, "description": f"No effect: {why}."} for name, why in _REASONS.items()
    }
    schema["properties"] |= others
    schema["additionalProperties"] = False


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`. `check_names` looks at fields that are not listed here."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, json_schema_extra=_with_no_effect)

    prompt: str = Field(
        description="Text; for a model that is conditioned on classes, the name of a class.", min_length=1
    )
    model: str | None = Field(
        None,
        description="Name or alias of a loaded model, as `GET /v1/models` lists them; left out, the only one "
        "that reads text, or else the only one.",
    )
    n: int | None = Field(1, ge=1, description="Number of images, up to the server's limit.")
    size: str | int | None = Field(
        "auto",
        description="`512x512`, `512*512` or `512`, up to 2048 a side: pictures are resampled to it; `auto`: "
        "the model's own.",
    )
    width: int | None = Field(None, ge=1, le=MAX_SIDE, description="With `height`, instead of `size`.")
    height: int | None = Field(None, ge=1, le=MAX_SIDE, description="With `width`, instead of `size`.")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd", "xhigh", "max"] | None = Field(
        "auto", description="How many passes to spend: as `quality` of `POST /generate`."
    )
    num_inference_steps: int | None = Field(
        None,
        ge=1,
        description="Instead of `quality`: the most passes to spend; the nearest budget that the model has.",
    )
    steps: int | None = Field(None, description="As of `POST /generate`.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None,
        description="`b64_json`, or `url`, a link to `GET /images/{receipt}`; left out, `url` for an alias "
        "`dall-e-…`, else `b64_json`.",
    )
    output_format: ImageFormat | None = Field("png", description="`png`, `jpeg` or `webp`.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP in `b64_json`, 0 to 100."
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        "auto", description="Images are opaque."
    )
    stream: bool | None = Field(False, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With `stream`: previews of an image before the final one."
    )
    seed: Seed = Field(None, description="As of `POST /generate`; not OpenAI's.")
    plan: str | None = Field(None, description="As of `POST /generate`, instead of `quality`; not OpenAI's.")


class FieldWarning(BaseModel):
    """A field of the request that changed nothing, or not as it says."""

    param: str
    message: str


class TokenDetails(BaseModel):
    """Tokens by kind; see `Usage`."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """The tokens that OpenAI bills by. Nothing is billed here, so that every number is 0."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    output_tokens_details: TokenDetails = TokenDetails()
    total_tokens: int = 0


class ImagesReply(BaseModel):
    """The reply of `POST /v1/images/generations`."""

    created: int
    data: list[dict[str, Any]] = Field(
        description="For each image `b64_json` or `url`, and our `receipt` and `seed`."
    )
    background: Literal["opaque"]
    output_format: ImageFormat
    quality: Literal["low", "medium", "high"] = Field(description="The one whose plan was applied.")
    size: str = Field(description="Of the pictures, as `512x512`.")
    native_size: str = Field(description="The model's own size.")
    usage: Usage = Field(description="Zeros: nothing is billed.")
    model: str = Field(description="Name of the model, also where it was asked for by an alias.")
    plan: str = Field(description="The sampler that was applied.")
    requested_plan: str
    steps: int
    warnings: list[FieldWarning] = Field(
        description="Fields without effect, each with `param` and `message`."
    )


class Translation(NamedTuple):
    """A request in our own terms."""

    wanted: GenerateRequest
    encoding: Encoding
    by_url: bool  # links instead of base64
    warnings: tuple[dict[str, str], ...]


def check_names(body: ImagesRequest) -> None:
    """Check that every field is one of ours, or one that clients of other servers send.

    Raises:
        BadRequestError: a field that is neither; the message has the most similar one.
    """
    ours = list(ImagesRequest.model_fields)
    for name in body.model_extra or ():
        if name not in _REASONS:
            close = difflib.get_close_matches(name, [*ours, *_REASONS], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            known = f"{hint}The fields are {', '.join(ours)}"
            raise BadRequestError(f"unknown field {shortened(name)!r}; {known}", param=shortened(name))


def translate(body: ImagesRequest, model: ServedModel) -> Translation:
    """Translate a body into a request to `POST /generate`, for the model that it is for.

    Raises:
        BadRequestError: fields that contradict one another; the prompt names no class of a model that is
            conditioned on classes; a size that is none.
    """
    _check_pairs(body)
    # A chat's prompts are long, and OpenAI's limit is 32,000 characters: what is beyond ours is cut off.
    try:
        label = None if model.manifest.reads_text else model.labels.find(body.prompt)
    except BadRequestError as error:
        raise BadRequestError(f"prompt: {error.message}", param="prompt") from None
    asked = body.size if body.width is None else f"{body.width}x{body.height}"
    form, by_url = body.output_format or "png", _by_url(body)
    compression = None if form in LOSSLESS or by_url else body.output_compression
    steps = _steps(body, model)
    # OpenAI's clients may send their default beside a plan.
    chosen = steps is not None or (body.plan is not None and body.quality in (None, "auto"))
    wanted = GenerateRequest(
        label=label,
        prompt=body.prompt[:MAX_CHARACTERS] if label is None else None,
        model=model.name,
        n=body.n or 1,
        seed=body.seed,
        steps=steps,
        quality=None if chosen else _QUALITIES[body.quality or "auto"],
        plan=body.plan,
        format=form,
        partial_images=(body.partial_images or 0) if body.stream else None,
    )
    encoding = Encoding(
        form,
        QUALITY if compression is None else compression,
        parse_size(asked, model.size, 1 if body.stream else wanted.n),
    )
    warnings = tuple({"param": name, "message": text} for name, text in _warnings(body, steps))
    return Translation(wanted, encoding, by_url, warnings)


def _by_url(body: ImagesRequest) -> bool:
    """Return whether links are asked for; OpenAI sends them by default for the models of this name, and
    LangChain relies on it.
    """
    if body.response_format is None and not body.stream:
        return (body.model or "").startswith("dall-e-")
    return body.response_format == "url"


def _check_pairs(body: ImagesRequest) -> None:
    if body.partial_images and not body.stream:
        raise BadRequestError("partial_images needs stream", param="partial_images")
    if body.stream and body.response_format == "url":
        raise BadRequestError("a stream sends b64_json", param="response_format")
    if (body.width is None) != (body.height is None):
        other = "width" if body.width is None else "height"
        raise BadRequestError("send both width and height, or size", param=other)
    if body.steps is not None and body.num_inference_steps is not None:
        raise BadRequestError("send either steps or num_inference_steps, not both", param="steps")


def _steps(body: ImagesRequest, model: ServedModel) -> int | None:
    if body.num_inference_steps is None:
        return body.steps
    return min(max(body.num_inference_steps, model.budgets.least), model.budgets.most)


def _warnings(body: ImagesRequest, steps: int | None) -> Iterator[tuple[str, str]]:
    """Yield each field that was sent and has no effect, or another than it says."""
    asked = body.num_inference_steps
    if asked is not None and asked != steps:
        yield "num_inference_steps", f"taken for {steps}, the nearest that the model has"
    if len(body.prompt) > MAX_CHARACTERS:
        yield "prompt", f"only its first {MAX_CHARACTERS} characters are read"
    if steps is not None and body.quality not in (None, "auto"):
        yield "quality", "no effect: the number of steps was sent"
    if body.width is not None and body.size not in (None, "auto"):
        yield "size", "no effect: width and height were sent"
    if body.background == "transparent":
        yield "background", "no effect: images are opaque"
    if body.output_compression is not None:
        if (body.output_format or "png") in LOSSLESS:
            if body.output_compression != 100:
                yield "output_compression", "no effect: PNG loses nothing"
        elif _by_url(body):
            yield "output_compression", "no effect: the file behind a url has one form only"
    for name, value in (body.model_extra or {}).items():
        if value is not None:
            yield name, f"no effect: {_REASONS[name]}"


def quality_of(model: ServedModel, plan: str, asked: str | None) -> Quality:
    """Return OpenAI's word for a plan: the one that was asked for where it leads to that plan."""
    first = _QUALITIES[asked or "auto"]
    words: tuple[Quality, ...] = ("low", "high") if first == "auto" else (first, "low", "high")
    return next((word for word in words if model.budgets.of_quality(word).plan.name == plan), "medium")
