"""Parts of the description of the interface (`/openapi.json`) that several routes have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from distilled_decoding.contract import ErrorReply
from server.generation.encoder import MEDIA_TYPES

Responses = dict[int | str, dict[str, Any]]


def errors(descriptions: dict[int, str]) -> Responses:
    """Describe replies that are errors, by status."""
    return {status: {"model": ErrorReply, "description": text} for status, text in descriptions.items()}


ERRORS = errors(
    {
        400: "The request contradicts the contract; `param` names the field.",
        404: "No model of that name is loaded.",
        406: "`Accept` admits nothing that can be sent.",
        409: "A receipt of weights or of a plan that are not here.",
        413: "The body is too long.",
        415: "The body is not declared as JSON.",
        429: "The queue is full; `Retry-After` says for how long.",
        500: "The device failed on this request.",
        503: "Not ready, shutting down, too busy for the request's `deadline_ms`, or its device was killed.",
        504: "`deadline_ms` passed before the images were done.",
    }
)
IMAGES: dict[str, Any] = {
    name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES.values()
}


def json_body(contract: type[BaseModel], **example: object) -> dict[str, Any]:
    """Describe a body, with an example, that the route reads itself."""
    content = {"application/json": {"schema": contract.model_json_schema(), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def event_stream(names: Sequence[str], about: str = "", data: str = "") -> dict[str, Any]:
    """Describe a stream of the events `names`, and what it and its data are."""
    of_data = {"type": "string", "contentMediaType": "application/json"}
    schema = {
        "type": "object",
        **({"description": about} if about else {}),
        "required": ["event", "data"],
        "properties": {
            "event": {"enum": names},
            "data": {**of_data, **({"description": data} if data else {})},
        },
    }
    return {"text/event-stream": {"schema": schema}}
