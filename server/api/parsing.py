"""From the bytes of a body to a request, with one clear sentence about what is wrong with it."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from distilled_decoding.contract import GenerateRequest
from server.errors import BadRequestError, InvalidJSONError

M = TypeVar("M", bound=BaseModel)
_SHOWN = 64  # characters of a field's name that a refusal repeats


def parse_generate(body: bytes) -> GenerateRequest:
    """The request to `POST /generate` in `body`; raises as `parse` does."""
    return parse(GenerateRequest, body)


def parse(contract: type[M], body: bytes) -> M:
    """The request in `body`.

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
        shown = param if len(param) <= _SHOWN else param[:_SHOWN] + "…"
        raise BadRequestError(f"unknown field {shown!r}; the fields are {fields}", param=shown)
    message = first["msg"]
    raise BadRequestError(f"{param}: {message[0].lower()}{message[1:]}", param=param)
