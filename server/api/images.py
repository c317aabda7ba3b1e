"""`GET /images/{receipt}`: an image by its receipt, as a resource with an ETag that never changes."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from distilled_decoding.contract import GenerateRequest, ImageFormat
from server.api.content import negotiate
from server.api.description import ERRORS, IMAGES
from server.api.responses import GenerateWriter, image_headers, send
from server.errors import BadRequestError
from server.generation.encoder import MEDIA_TYPES, Encoding
from server.generation.request import GenerationRequest, resolve, resolve_model
from server.generation.runner import GenerationRun
from server.generation.sizes import parse_size, shown
from server.observability.metrics import package_version
from server.observability.record import record_of
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
    size: Annotated[
        str | None, Query(description="`512x512`: resampled to it; `auto` or left out, the model's own.")
    ] = None,
) -> Response:
    """The picture that a reply's `receipt` names, made again."""
    server = state_of(request)
    settings = server.settings
    with ExitStack() as owned:
        record = owned.enter_context(record_of(request.scope, server.metrics, settings.log_prompts))
        pool, encoder = server.accepting()
        body = _body(receipt, image_format)
        form = negotiate(request.headers.get("accept"), image_format, 1, image_only=True)
        model, redeemed = resolve_model(body, server.models(), settings.max_images, streamed=False)
        record.model = model.name
        generation = resolve(body, model, redeemed, settings, pool.forecast, record.arrived)
        encoding = Encoding(form.image_format, size=parse_size(size, model.size))
        record.choose(**generation.logged)
        headers = _cache_headers(generation, encoding, pool.kind, settings)
        if _unchanged(request.headers.get("if-none-match"), headers["etag"]):
            record.generates = False
            return Response(status_code=304, headers=headers)
        if "head" in request.scope:
            record.generates = False
            facts = image_headers(generation, record, form.image_format)
            reply = Response(media_type=MEDIA_TYPES[form.image_format], headers=facts | headers)
            del reply.headers["content-length"]  # it would have to be computed
            return reply
        run = owned.enter_context(GenerationRun(generation, pool, encoder, encoding, record))
        reply = await send(GenerateWriter(run, raw=True), owned)
        reply.headers.update(headers)
        return reply


def _body(receipt: str, image_format: ImageFormat | None) -> GenerateRequest:
    try:
        # Low: whoever can write a link can write one to any receipt, and a page's images cannot be refused.
        return GenerateRequest(receipt=receipt, format=image_format, priority="low")
    except ValueError:
        raise BadRequestError("receipt is too long to be one", param="receipt") from None


def _cache_headers(
    generation: GenerationRequest, encoding: Encoding, kind: str, settings: Settings
) -> dict[str, str]:
    """Tag all that the bytes follow from: of another build or kind of device they may differ."""
    size = () if encoding.size is None else (shown(encoding.size),)
    receipt = generation.receipt(0, generation.plan)
    parts = (receipt, encoding.image_format, package_version(), kind, *size)
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
