"""`/models`: what is loaded, what it costs and what it was measured to reach. `/admin`: load and unload
models while the server runs, where admin keys are set.
"""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from dd_core.errors import DDError
from server.api.content import read_json
from server.api.description import errors, json_body
from server.errors import ApiError, BadRequestError, UnknownModelError, shortened
from server.models.catalog import ServedModel
from server.state import ServerState, state_of

router = APIRouter(tags=["models"])
admin = APIRouter(prefix="/admin", tags=["admin"])


@router.get("/models", summary="The loaded models", response_class=Response)
async def models(request: Request) -> Response:
    """Classes, image size, plans with cost and measured metrics, budgets, defaults, determinism."""
    state = state_of(request)
    entries = [_entry(state, model) for model in state.models().models.values()]
    return Response(orjson.dumps({"models": entries}), media_type="application/json")


def _entry(state: ServerState, model: ServedModel) -> dict[str, Any]:
    settings, aliases = state.settings, state.catalog.aliases_of(model.name)
    return {**model.describe(settings.max_images, settings.determinism), "aliases": aliases}


class LoadRequest(BaseModel):
    """The body of `POST /admin/models`."""

    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)

    model: str = Field(min_length=1, description="Built-in or published model, or a bundle's folder.")


@admin.get("/models", summary="The loaded models, and loads under way", response_class=Response)
async def changes(request: Request) -> Response:
    """Names and folders; the source, name (null = not known yet) and seconds of each load; unloads."""
    return Response(orjson.dumps(state_of(request).loads.describe()), media_type="application/json")


@admin.post(
    "/models",
    summary="Load a model",
    response_class=Response,
    status_code=201,
    responses=errors(
        {
            400: "There is no such model, or it cannot be served.",
            409: "A model has this name, or this alias, or is being loaded; or the load was cancelled.",
            503: "Not ready, or shutting down; or the device process was killed from outside meanwhile.",
            504: "It was not loaded within `load_timeout`.",
        }
    ),
    openapi_extra=json_body(LoadRequest, model="var-dd-d16"),
)
async def load(request: Request) -> Response:
    """Fetch it where it must, load it on every device and warm it up; others are served meanwhile."""
    state = state_of(request)
    body = await read_json(request, LoadRequest, state.settings.max_body_bytes)
    pool, _ = state.accepting()
    try:
        model = await state.loads.load(pool, body.model)
    except ApiError:
        raise
    except DDError as error:
        raise BadRequestError(error.message, param="model") from error
    return Response(orjson.dumps(_entry(state, model)), 201, media_type="application/json")


@admin.delete(
    "/models/{name:path}",  # or the source of a load, which may be a folder
    summary="Unload a model, or cancel its load",
    response_class=Response,
    status_code=204,
    responses=errors({404: "No model of that name is loaded or being loaded."}),
)
async def unload(request: Request, name: str) -> Response:
    """Take no more requests for it, let those that it has end, and free its memory. A load that goes on
    (named by its model or its source) ends with 409.
    """
    state = state_of(request)
    pool, _ = state.accepting()
    if not await state.loads.unload(pool, name) and not await state.loads.cancel(name):
        raise UnknownModelError(f"no model {shortened(name)!r} is loaded or being loaded", param="name")
    return Response(status_code=204)
