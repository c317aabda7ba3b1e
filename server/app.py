"""The ASGI application.

    create_app → lifespan: load → start the worker → serve (warming up) → ready → drain → stop

The socket opens once the model is loaded; until every plan has run once, `/healthz` says 200 and
`/readyz` 503.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from dd_core.bundle import Bundle
from dd_core.runtime import pick_device
from server.catalog import Catalog
from server.errors import install_error_handlers
from server.images import Encoder
from server.metrics import package_version
from server.middleware import BodyLimit, RequestContext
from server.models import load
from server.routes import generate, health, metrics, models, page
from server.scheduler import Scheduler
from server.settings import Settings
from server.state import Phase, ServerState
from server.worker import DeviceWorker

log = logging.getLogger("dd_server")

# Seconds that a running batch still gets after the drain, before the process ends without it.
_LAST_BATCH_SECONDS = 5.0


async def _until_warm(state: ServerState, warmed: asyncio.Future[None]) -> None:
    try:
        await warmed
    except Exception as error:
        log.exception("warm-up failed")
        state.enter(Phase.FAILED)
        state.on_failure(error)
        return
    if state.phase is Phase.WARMING_UP:
        state.enter(Phase.READY)
        state.on_ready()


def create_app(settings: Settings, bundle: Bundle | None = None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        settings: see `server.settings`.
        bundle: a loaded model; None = `settings.model` is loaded when the application starts.

    Raises:
        InvalidPlanError: the bundle offers no plan.
    """
    state = ServerState(settings)
    if bundle is not None:
        state.catalog = Catalog([bundle])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if state.catalog is None:
            device = pick_device(settings.device)
            state.catalog = Catalog([await asyncio.to_thread(load, settings.model, device)])
        for name, model in state.catalog.models.items():
            state.metrics.bind(name, [preset.plan for preset in model.bundle.presets])
        scheduler = Scheduler(settings.max_batch, settings.queue_size)
        bundles = {name: model.bundle for name, model in state.catalog.models.items()}
        state.worker = DeviceWorker(bundles, scheduler, state.metrics)
        state.encoder = Encoder(settings.encode_threads)
        state.enter(Phase.WARMING_UP)
        warming = asyncio.create_task(_until_warm(state, state.worker.start(settings.warmup)))
        try:
            yield
        finally:
            state.drain()
            warming.cancel()
            if not await asyncio.to_thread(state.worker.stop, _LAST_BATCH_SECONDS):
                log.warning("the last batch had not ended %.0f s after the drain", _LAST_BATCH_SECONDS)
            state.encoder.close()

    app = FastAPI(
        title="Distilled Decoding",
        summary="One-step image generation.",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.dd = state
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(RequestContext)
    for module in (generate, models, health, metrics, page):
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=page.STATIC), name="static")
    return app
