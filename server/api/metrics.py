"""`/metrics` in Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.state import state_of

router = APIRouter(tags=["health"])


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Every metric of `server.observability.metrics`."""
    return Response(state_of(request).metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})
