"""`GET /images/{receipt}`: an image by its receipt, as a resource with an ETag that never changes."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from distilled_decoding.contract import GenerateRequest, ImageFormat
from server.api.content import ReplyForm, negotiate
from server.api.generate import ERRORS, IMAGES
from server.api.responses import raw_reply
from server.errors import BadRequestError
from server.generation.making import make
from server.generation.pictures import Form
from server.generation.request import Order, addressed, place
from server.observability.logs import CLIENT_LEFT
from server.observability.metrics import package_version
from server.observability.record import open_record
from server.settings import Settings
from server.state import state_of

router = APIRouter(tags=["generate"])

_YEAR = 365 * 24 * 3600


@router.get(
    "/images/{receipt}",
    summary="An image by its receipt",
    response_class=Response,
    responses={
        200: {"content": IMAGES, "description": "The image's bytes, the same every time."},
        304: {"description": "`If-None-Match` names these very bytes; nothing was computed."},
        **{status: reply for status, reply in ERRORS.items() if status not in (413, 415)},
    },
)
async def image(
    request: Request,
    receipt: str,
    image_format: Annotated[
        ImageFormat | None,
        Query(alias="format", description="`png` (default), `jpeg` or `webp`; left out, `Accept` decides."),
    ] = None,
) -> Response:
    """The picture that a reply's `receipt` names, made again."""
    state = state_of(request)
    with open_record(request, state) as account:
        engine, encoder = state.accepting()
        body = _body(receipt, image_format)
        form = negotiate(request.headers.get("accept"), image_format, 1, image_only=True)
        model, found = addressed(body, state, stream=False)
        account.addressed(model.name)
        order = place(body, model, found, state.settings, engine, account.arrived)
        account.ordered(order)
        headers = _cache_headers(order, form, engine.kind, state.settings)
        if _unchanged(request.headers.get("if-none-match"), headers["etag"]):
            account.outcome = "ok"
            return Response(status_code=304, headers=headers)
        made = await make(request, account, engine, encoder, order, Form(form.image_format))
        if made is None:
            return Response(status_code=CLIENT_LEFT)
        reply = raw_reply(order, request.state.request_id, made, form.image_format)
        reply.headers.update(headers)
        return reply


def _body(receipt: str, image_format: ImageFormat | None) -> GenerateRequest:
    try:
        # Low: whoever can write a link can write one to any receipt, and a page's images cannot be refused.
        return GenerateRequest(receipt=receipt, format=image_format, priority="low")
    except ValueError:
        raise BadRequestError("receipt is too long to be one", param="receipt") from None


def _cache_headers(order: Order, form: ReplyForm, kind: str, settings: Settings) -> dict[str, str]:
    """A tag of all that the bytes follow from: of another build or kind of device they may differ."""
    parts = (order.receipt(0, order.plan), form.image_format, package_version(), kind)
    tag = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    weak = "" if settings.determinism == "exact" else "W/"
    whose = "private" if settings.api_keys_file else "public"
    lasting = f"{whose}, max-age={_YEAR}, immutable"
    return {"etag": f'{weak}"{tag}"', "cache-control": lasting, "vary": "accept"}


def _unchanged(if_none_match: str | None, etag: str) -> bool:
    if not if_none_match:
        return False
    known = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in known or etag.removeprefix("W/") in known
