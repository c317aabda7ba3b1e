"""`/models`: what is loaded, what it costs and what it was measured to reach."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.state import state_of

router = APIRouter(tags=["models"])


@router.get("/models", summary="The loaded models", response_class=Response)
async def models(request: Request) -> Response:
    """Classes, image size, plans with cost and measured metrics, budgets, defaults, determinism."""
    state = state_of(request)
    limit, determinism = state.settings.max_images, state.settings.determinism
    entries = [model.describe(limit, determinism) for model in state.models().models.values()]
    return Response(orjson.dumps({"models": entries}), media_type="application/json")
