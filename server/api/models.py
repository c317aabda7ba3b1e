"""`/models`: what is loaded, what it costs and what it was measured to reach. `/admin`: load and unload
models while the server runs, where admin keys are set.
"""

from __future__ import annotations

import asyncio

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from dd_core.errors import DDError
from server.api.description import errors
from server.errors import ApiError, BadRequestError, ConflictError, UnknownModelError
from server.models.catalog import find
from server.state import state_of

router = APIRouter(tags=["models"])
admin = APIRouter(prefix="/admin", tags=["admin"])


@router.get("/models", summary="The loaded models", response_class=Response)
async def models(request: Request) -> Response:
    """Classes, image size, plans with cost and measured metrics, budgets, defaults, determinism."""
    state = state_of(request)
    limit, determinism = state.settings.max_images, state.settings.determinism
    entries = [model.describe(limit, determinism) for model in state.models().models.values()]
    return Response(orjson.dumps({"models": entries}), media_type="application/json")


class LoadRequest(BaseModel):
    """The body of `POST /admin/models`."""

    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)

    model: str = Field(min_length=1, description="Built-in or published model, or a bundle's folder.")


@admin.post(
    "/models",
    summary="Load a model",
    response_class=Response,
    status_code=201,
    responses=errors(
        {400: "There is no such model, or it cannot be served.", 409: "A model of this name is loaded."}
    ),
)
async def load(request: Request, body: LoadRequest) -> Response:
    """Fetch it where it must, load it on every device and warm it up; others are served meanwhile."""
    state = state_of(request)
    async with state.changing:
        pool, _ = state.accepting()
        try:
            model = await asyncio.to_thread(find, body.model)
            if model.name in state.catalog.models:
                loaded = state.catalog.models[model.name].folder
                raise ConflictError(
                    f"a model {model.name} is loaded already, from {loaded}; {body.model} needs another "
                    "name in its manifest",
                    param="model",
                )
            await pool.load(model)
            state.metrics.bind(model.name, model.presets)
        except ApiError:
            raise
        except DDError as error:
            raise BadRequestError(error.message, param="model") from error
        state.catalog.models[model.name] = model
    entry = model.describe(state.settings.max_images, state.settings.determinism)
    return Response(orjson.dumps(entry), 201, media_type="application/json")


@admin.delete(
    "/models/{name}",
    summary="Unload a model",
    response_class=Response,
    status_code=204,
    responses=errors({404: "No model of that name is loaded."}),
)
async def unload(request: Request, name: str) -> Response:
    """Take no more requests for it, let those that it has end, and free its memory."""
    state = state_of(request)
    async with state.changing:
        pool, _ = state.accepting()
        if state.catalog.models.pop(name, None) is None:
            raise UnknownModelError(f"no model {name[:64]!r} is loaded", param="name")
        await pool.unload(name)
    return Response(status_code=204)
