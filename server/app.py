"""The ASGI application.

    create_app → lifespan: find the models → start the device processes → serve while these load and
    warm up → ready → drain → stop

The socket opens once the models are found; until every plan has run, `/healthz` says 200 and
`/readyz` 503.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from server.api import generate, health, images, models, openai, pages
from server.devices.finder import find_apart
from server.devices.messages import Prepare
from server.devices.placement import usable_cores, worker_specs
from server.devices.pool import DevicePool
from server.errors import install_error_handlers
from server.generation.encoder import Encoder
from server.middleware.stack import install_middleware
from server.models.catalog import ServedModel, check_aliases, find_all, sources_of
from server.observability.metrics import package_version
from server.settings import Settings
from server.state import Phase, ServerState

log = logging.getLogger("dd_server")

# A request makes some hundred objects that are gone with it, and hardly a cycle: at the default of 700, every
# other request would look for one.
_COLLECT = (50_000, 10, 10)


async def _load(state: ServerState, pool: DevicePool, served: Sequence[ServedModel]) -> None:
    """Load and warm up the models; then the server is ready, or has failed."""
    try:
        began = time.perf_counter()
        await pool.start()
        state.metrics.started("processes", time.perf_counter() - began)
        for model in served:
            state.metrics.bind(model.name, model.presets)
            times = await pool.load(model)
            state.metrics.started("load", times.load)
            state.metrics.started("warmup", times.warmup)
            state.metrics.loaded(model.name, model.manifest.digest, times.load + times.warmup)
            state.catalog.models[model.name] = model
    except Exception as error:
        if state.phase is not Phase.DRAINING:  # else the signal reached the processes of the start as well
            log.exception("the start failed")
            state.fail(error)
        return
    if state.phase is Phase.WARMING_UP:
        # What is here now stays: a collection need not look at the half million objects of the libraries.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        state.enter(Phase.READY)
        state.on_ready()


def create_app(
    settings: Settings, served: Sequence[ServedModel] | None = None, prepare: Prepare | None = None
) -> FastAPI:
    """Make the server as an ASGI application.

    Args:
        settings: see `server.settings`.
        served: the models; None = `settings.model` is found (and fetched) when the application starts.
        prepare: see `server.devices.messages.DeviceOptions`.

    Raises:
        InvalidRequestError: a file of keys cannot be used; an alias is of no model, or a model's name.
    """
    state = ServerState(settings)
    if served is not None:
        check_aliases(settings.aliases, [model.name for model in served])

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        found = served
        if found is None:
            began = time.perf_counter()
            found = await find_apart(find_all, sources_of(settings.model), settings)
            state.metrics.started("find", time.perf_counter() - began)
            check_aliases(settings.aliases, [model.name for model in found])
        weights = sum(model.bytes for model in found)
        pool = state.pool = DevicePool(
            settings,
            worker_specs(settings.device, settings.threads, weights, usable_cores()),
            state.metrics,
            on_change=state.measure_readiness,
            on_failure=state.fail,
            prepare=prepare,
        )
        state.encoder = Encoder(settings.encode_threads)
        state.enter(Phase.WARMING_UP)
        loading = asyncio.create_task(_load(state, pool, found))
        try:
            yield
        finally:
            state.drain()
            loading.cancel()
            await asyncio.wait([loading])
            await pool.stop()
            state.encoder.close()

    app = FastAPI(
        title="Distilled Decoding",
        summary="One-step image generation.",
        version=package_version(),
        lifespan=lifespan,
        openapi_url=None,  # server.api.pages serves it
        docs_url=None,
        redoc_url=None,
    )
    app.state.dd = state
    install_error_handlers(app)
    direct = [
        Route("/generate", generate.generate, methods=["POST"]),
        Route("/v1/images/generations", openai.generations, methods=["POST"]),
    ]
    install_middleware(app, settings, state.metrics.traffic, direct)
    routers = [module.router for module in (generate, images, openai, models, health, pages)]
    if settings.admin_keys_file is not None:
        routers.append(models.admin)
    for router in routers:
        app.include_router(router)
    static = Mount("/static", pages.whole(StaticFiles(directory=pages.STATIC)), name="static")
    app.router.routes.append(static)
    ours = [route for router in routers for route in router.routes if isinstance(route, Route)]
    state.metrics.traffic.bind([*ours, static])
    return app
