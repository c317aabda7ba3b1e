"""`/healthz`: the process lives. `/readyz`: it is warmed up and accepts work. `/metrics`: for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.description import errors
from server.errors import UnavailableError, error_response
from server.state import Phase, state_of

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process lives", response_class=Response)
async def healthz(request: Request) -> Response:
    """200 as long as the process answers; 500 after a warm-up that failed."""
    if state_of(request).phase is Phase.FAILED:
        return Response('{"status":"failed"}', 500, media_type="application/json")
    return Response('{"status":"ok"}', media_type="application/json")


@router.get(
    "/readyz",
    summary="Warmed up and accepting",
    response_class=Response,
    responses=errors({503: "Loading, warming up, draining, or replacing every device process."}),
)
async def readyz(request: Request) -> Response:
    """200 only between the end of warm-up and the start of the drain, while a device process lives."""
    try:
        state_of(request).check_ready()
    except UnavailableError as error:
        return error_response(error)
    return Response('{"status":"ready"}', media_type="application/json")


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Every metric of `server.observability.metrics`; as OpenMetrics where `Accept` asks for it."""
    text, media_type = state_of(request).metrics.exposition(request.headers.get("accept", ""))
    return Response(text, headers={"content-type": media_type})
