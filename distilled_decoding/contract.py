"""The JSON of the HTTP contract: requests, replies, events. Fields are only ever added.

The server validates requests with these models, and the client replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

ImageFormat = Literal["png", "jpeg", "webp"]
SUFFIXES: dict[str, ImageFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
LOSSLESS: frozenset[ImageFormat] = frozenset({"png"})  # the others have a quality
QUALITY = 95  # of a JPEG or WebP file, 0 to 100
# Places of an image's receipt in its file: PNG's text chunk, and EXIF's ImageDescription of the others.
PNG_RECEIPT = "dd-receipt"
EXIF_RECEIPT = 0x010E
Priority = Literal["low", "normal", "high"]
Quality = Literal["low", "medium", "high", "auto"]
MAX_SEED = 2**63 - 1
# JavaScript reads a larger number as another one.
MAX_SEED_AS_NUMBER = 2**53 - 1
MAX_DEADLINE_MS = 3_600_000
MAX_FID = 10_000


def _index_or_name(value: Any) -> Any:
    # One message in place of the two of a failed union; and True is not a class index.
    if value is None or isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise PydanticCustomError("label_type", "must be a class index (an integer) or a class name (a string)")


def _seed(value: Any) -> Any:
    digits = value if isinstance(value, str) and value.isascii() and value.isdigit() else ""
    number = value if isinstance(value, int) and not isinstance(value, bool) else -1
    if (
        value is None
        or 0 <= number <= MAX_SEED_AS_NUMBER
        or (0 < len(digits) <= len(str(MAX_SEED)) and int(digits) <= MAX_SEED)
    ):
        return value
    raise PydanticCustomError(
        "seed_type",
        "must be an integer from 0 to {number}, or text of one up to {text}",
        {"number": MAX_SEED_AS_NUMBER, "text": MAX_SEED},
    )


Seed = Annotated[
    int | str | None,
    BeforeValidator(_seed),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": MAX_SEED_AS_NUMBER},
                {"type": "string", "pattern": "^[0-9]{1,19}$"},
                {"type": "null"},
            ]
        }
    ),
]


def _or(default: Any) -> BeforeValidator:
    """Take null for left out, as it is in every other field."""
    return BeforeValidator(lambda value: default if value is None else value)


def _nullable(schema: dict[str, Any]) -> None:
    """Describe a field that also takes null."""
    kept = {key: schema.pop(key) for key in ("type", "minimum", "enum") if key in schema}
    schema["anyOf"] = [kept, {"type": "null"}]


class GenerateRequest(BaseModel):
    """The body of `POST /generate`. Types are strict: `"1"`, `1.0` and `true` are not integers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    label: Annotated[int | str | None, BeforeValidator(_index_or_name)] = Field(
        None, description="Class index, or class name in any case; exactly one of `label` and `prompt`."
    )
    prompt: str | None = Field(None, description="Text, for models that are conditioned on text.")
    model: str | None = Field(
        None,
        description="Name or alias of a loaded model; may be left out where one alone takes a label, or a "
        "prompt.",
    )
    steps: int | None = Field(
        None,
        description="Step budget: the most forward passes to spend, 1 (the default) to the full teacher's. "
        "The server picks the best plan within it.",
    )
    quality: Quality | None = Field(
        None,
        description="Instead of `steps`: `low` (the cheapest plan), `medium`, `high` (the best), or `auto` "
        "(as good as the load allows within the server's `auto_latency_ms`).",
    )
    latency_budget_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_MS,
        description="The best plan that is expected to be done within so many milliseconds; the cheapest one "
        "where none is. A preference, where `deadline_ms` is a limit.",
    )
    min_quality: float | None = Field(
        None, gt=0, le=MAX_FID, description="The highest measured FID to accept of a plan; lower is better."
    )
    plan: str | None = Field(
        None,
        description="Instead of the four above: the name of a plan that `GET /models` offers. It is "
        "applied whatever was measured of it, and never replaced under load.",
    )
    brownout: Annotated[bool, _or(True)] = Field(
        True,
        json_schema_extra=_nullable,
        description="`true`: a busy server may use a cheaper plan; the reply names both plans. `false`: the "
        "request waits, or is refused, instead.",
    )
    n: Annotated[int, _or(1)] = Field(
        1, ge=1, json_schema_extra=_nullable, description="Number of images, up to the server's limit."
    )
    seed: Seed = Field(
        None,
        description="Image i is a function of (seed, i); left out, the server draws a seed and reports it. "
        "One beyond 2⁵³ − 1, up to 2⁶³ − 1, is sent as text.",
    )
    receipt: str | None = Field(
        None,
        min_length=1,
        max_length=8192,
        description="Instead of `label` or `prompt`: an image that was made before, to repeat, to refine "
        "(`steps`) or to vary (`keep`).",
    )
    keep: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="With `receipt`: the share of blocks whose tokens are kept; the rest is drawn anew, "
        "from `seed`.",
    )
    partial_images: int | None = Field(
        None,
        ge=0,
        le=8,
        description="With `Accept: text/event-stream`: most previews of an image before the final one; left "
        "out, all that there are.",
    )
    format: ImageFormat | None = Field(
        None, description="`png` (default), `jpeg` or `webp`; left out, `Accept` may decide."
    )
    priority: Annotated[Priority, _or("normal")] = Field(
        "normal", json_schema_extra=_nullable, description="Of requests that wait, the higher goes first."
    )
    deadline_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_MS,
        description="Milliseconds from arrival within which the images must be done. A request that cannot "
        "be in time is refused at once with 503; one whose time passes is dropped with 504.",
    )


class GenerateOptions(TypedDict, total=False):
    """The fields of `GenerateRequest` as keyword arguments of the client. None is the same as left out."""

    label: int | str | None
    prompt: str | None
    model: str | None
    steps: int | None
    quality: Quality | None
    latency_budget_ms: float | None
    min_quality: float | None
    plan: str | None
    brownout: bool | None
    n: int | None
    seed: int | str | None
    format: ImageFormat | None
    receipt: str | None
    keep: float | None
    priority: Priority | None
    deadline_ms: float | None


class StreamOptions(GenerateOptions, total=False):
    """The same for a stream; `partial_images` limits the previews of each image."""

    partial_images: int | None


_SEED_TEXT = "The seed as text, where it is beyond 2⁵³ − 1: JavaScript reads the number as another one."


class ImageReply(BaseModel):
    """One image of a JSON reply."""

    index: int = Field(description="The image's number among those of its seed; its receipt keeps it.")
    seed: int
    seed_text: str | None = Field(None, description=_SEED_TEXT)
    format: ImageFormat
    width: int = Field(description="In pixels.")
    height: int = Field(description="In pixels.")
    receipt: str = Field(description="All that the image follows from; also in the file's own metadata.")
    data: str = Field(description="The encoded image in base64.", repr=False)


class Timings(BaseModel):
    """Times in milliseconds: waiting, on the device, encoding, and from arrival to reply."""

    queue_ms: float = Field(description="Waiting for a device.")
    compute_ms: float = Field(description="On the device.")
    encode_ms: float = Field(description="Encoding the files.")
    total_ms: float = Field(description="From arrival to reply.")


class GenerateReply(BaseModel):
    """The JSON reply of `POST /generate`."""

    id: str = Field(description="Of the request, as in `x-request-id`; the client's own if it sent one.")
    model: str = Field(description="Name of the model.")
    plan: str = Field(description="The sampler that was applied.")
    requested_plan: str = Field(
        description="The sampler that an idle server would have applied; `plan` may differ under load."
    )
    steps: int = Field(description="Forward passes that this plan spends on each image.")
    seed: int = Field(description="Given or drawn.")
    seed_text: str | None = Field(None, description=_SEED_TEXT)
    images: Sequence[ImageReply] = Field(
        description="For each image `index`, `seed`, `format`, `width`, `height`, `receipt` and `data`."
    )
    timings: Timings = Field(description="Milliseconds: `queue_ms`, `compute_ms`, `encode_ms`, `total_ms`.")


class ImageEvent(BaseModel):
    """The `image` event of a stream: one image, complete, by one plan."""

    id: str
    model: str
    plan: str = Field(description="The sampler that made this picture.")
    steps: int = Field(description="Forward passes that this plan spends.")
    requested_plan: str
    seed: int
    seed_text: str | None = Field(None, description=_SEED_TEXT)
    stage: int = Field(description="0 for the first picture of an image, and so on.")
    final: bool = Field(description="False for a preview: a better picture of the same image follows.")
    image: ImageReply
    timings: Timings


class DoneEvent(BaseModel):
    """The `done` event, the last of a stream."""

    id: str
    images: int
    total_ms: float


class ErrorBody(BaseModel):
    """The description of an error."""

    type: str = Field("", description="The kind of error, by OpenAI's names.")
    code: str
    message: str
    param: str | None = Field(description="The offending field of the request, where there is one.")


class ErrorReply(BaseModel):
    """The body of every unsuccessful reply."""

    error: ErrorBody
