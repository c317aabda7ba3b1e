"""The JSON of the HTTP contract. Fields are only ever added."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from server.errors import BadRequestError, InvalidJSONError

ImageFormat = Literal["png", "jpeg", "webp"]
Priority = Literal["low", "normal", "high"]
MAX_SEED = 2**63 - 1
MAX_DEADLINE_MS = 3_600_000


def _index_or_name(value: Any) -> Any:
    # One message in place of the two that a failed union gives; and True is no class index.
    if value is None or isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise PydanticCustomError("label_type", "must be a class index (an integer) or a class name (a string)")


class GenerateRequest(BaseModel):
    """The body of `POST /generate`. Types are strict: `"1"`, `1.0` and `true` are no integers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    label: Annotated[int | str | None, BeforeValidator(_index_or_name)] = Field(
        None, description="Class index, or class name in any case; exactly one of `label` and `prompt`."
    )
    prompt: str | None = Field(None, description="Text, for models that are conditioned on text.")
    model: str | None = Field(None, description="Name of a loaded model; may be left out when one is loaded.")
    steps: int = Field(
        1,
        description="Step budget: the most forward passes to spend, 1 to the full teacher's. "
        "The server picks the best plan within it.",
    )
    n: int = Field(1, ge=1, description="Number of images, up to the server's limit.")
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Image i is a function of (seed, i); left out, the server draws a seed and reports it.",
    )
    format: ImageFormat | None = Field(
        None, description="`png` (default), `jpeg` or `webp`; left out, `Accept` may decide."
    )
    priority: Priority = Field("normal", description="Of requests that wait, the higher goes first.")
    deadline_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_MS,
        description="Milliseconds from arrival within which the images must be done. A request that cannot "
        "be in time is refused at once with 503; one whose time passes is dropped with 504.",
    )


class ImageReply(BaseModel):
    """One image of a JSON reply."""

    index: int
    seed: int
    format: ImageFormat
    width: int
    height: int
    data: str = Field(description="The encoded image in base64.")


class Timings(BaseModel):
    """Milliseconds: waiting, on the device, encoding, and from arrival to reply."""

    queue_ms: float
    compute_ms: float
    encode_ms: float
    total_ms: float


class GenerateReply(BaseModel):
    """The JSON reply of `POST /generate`."""

    id: str
    model: str
    plan: str = Field(description="The sampler that was picked within the budget.")
    steps: int = Field(description="Forward passes that this plan spends on each image.")
    seed: int
    images: list[ImageReply] = Field(
        description="For each image `index`, `seed`, `format`, `width`, `height` and `data` (base64)."
    )
    timings: Timings


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str
    message: str
    param: str | None = Field(description="The offending field of the request, where there is one.")


class ErrorReply(BaseModel):
    """Every reply that is not a success."""

    error: ErrorBody


def parse_generate(body: bytes) -> GenerateRequest:
    """The request in `body`.

    Raises:
        InvalidJSONError: not JSON.
        BadRequestError: not this contract; `param` is the field, the message says what it allows.
    """
    try:
        return GenerateRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise InvalidJSONError(f"the body is not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')})")
    if not first["loc"]:
        raise BadRequestError("the body must be a JSON object")
    param = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        fields = ", ".join(GenerateRequest.model_fields)
        shown = param if len(param) <= 64 else param[:64] + "…"
        raise BadRequestError(f"unknown field {shown!r}; the fields are {fields}", param=shown)
    message = first["msg"]
    raise BadRequestError(f"{param}: {message[0].lower()}{message[1:]}", param=param)
