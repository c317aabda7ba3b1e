"""Read the body of a request, and choose the form of its reply.

`Accept` and `format` lead to JSON with base64, the bytes of one image, or a stream of events. JSON is the
default, and wins ties; a stream has to be named. An image type named in `Accept` asks for raw bytes;
`image/*` leaves the type to `format`. A `format` that `Accept` excludes is refused with 406 rather than
ignored, and so are raw bytes of more than one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from distilled_decoding.contract import ImageFormat
from server.api.decoding import decoded
from server.errors import BadRequestError, InvalidJSONError, NotAcceptableError, shortened
from server.generation.encoder import MEDIA_TYPES

M = TypeVar("M", bound=BaseModel)
_JSON = "application/json"
_EVENTS = "text/event-stream"


async def read_json(request: Request, contract: type[M], limit: int) -> M:
    """Read the body of `request` as JSON of `contract`.

    Args:
        limit: most bytes of the body when it is no longer compressed.

    Raises:
        ApiError: as `decoded` and `parse` do.
    """
    return parse(contract, decoded(request.headers, await request.body(), limit))


def parse(contract: type[M], body: bytes) -> M:
    """Validate `body` as JSON of `contract`.

    Raises:
        InvalidJSONError: not JSON.
        BadRequestError: not this contract; `param` is the field, the message says what it allows.
    """
    try:
        return contract.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise InvalidJSONError(f"the body is not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')})")
    if not first["loc"]:
        raise BadRequestError("the body must be a JSON object")
    param = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        fields = ", ".join(contract.model_fields)
        shown = shortened(param)
        raise BadRequestError(f"unknown field {shown!r}; the fields are {fields}", param=shown)
    message = first["msg"]
    raise BadRequestError(f"{param}: {message[0].lower()}{message[1:]}", param=param)


@dataclass(frozen=True)
class ReplyForm:
    """Raw bytes, a stream or else JSON, and the image's format in each of them."""

    raw: bool
    image_format: ImageFormat
    stream: bool = False


def _qualities(accept: str) -> dict[str, float]:
    """Parse media ranges with their q-values; what cannot be read counts as 0."""
    ranges: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = min(1.0, max(0.0, float(parameter[2:])))
                except ValueError:
                    quality = 0.0
        if name:
            ranges[name] = quality
    return ranges


def negotiate(
    accept: str | None, image_format: ImageFormat | None, n: int, *, image_only: bool = False
) -> ReplyForm:
    """Choose the reply's form for a request's `Accept` header, `format` field and `n`.

    Args:
        image_only: where there is neither JSON nor a stream to be had.

    Raises:
        NotAcceptableError: nothing that `Accept` admits can be sent.
    """
    ranges = _qualities(accept or "*/*") or {"*/*": 1.0}

    def rank(media_type: str) -> tuple[float, int]:
        family = media_type.split("/")[0] + "/*"
        for precision, name in ((2, media_type), (1, family), (0, "*/*")):
            if name in ranges:
                return ranges[name], precision
        return 0.0, 0

    images = {name: rank(media_type) for name, media_type in MEDIA_TYPES.items()}
    best, json = max(images.values()), (-1.0, 0) if image_only else rank(_JSON)
    if not image_only and ranges.get(_EVENTS, 0.0) > max(json[0], best[0]):
        return ReplyForm(False, image_format or "png", stream=True)
    if max(best, json)[0] <= 0.0:
        others = () if image_only else (_JSON, _EVENTS)
        raise NotAcceptableError(
            f"Accept must admit one of {', '.join((*others, *MEDIA_TYPES.values()))}", param="accept"
        )
    if json >= best:
        return ReplyForm(False, image_format or "png")
    if n > 1:
        raise NotAcceptableError("raw bytes hold one image: set n to 1 or accept application/json", param="n")
    if image_format is None:
        return ReplyForm(True, max(images, key=lambda name: images[name]))
    if images[image_format][0] <= 0.0:
        raise NotAcceptableError(
            f"format is {image_format}, but Accept does not admit {MEDIA_TYPES[image_format]}; "
            "leave one of the two out",
            param="format",
        )
    return ReplyForm(True, image_format)
