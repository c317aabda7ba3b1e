"""The server as an application of Ray Serve: one `dd-server` in each replica.

    PYTHONPATH=deploy/ray serve run serve:app         # DD_SERVER_… in the environment of the replicas

    Ray's proxy ─▶ a replica ─▶ the ASGI application, as in dd-server serve
    GET /metrics ─▶ any replica ─▶ all replicas: their series, with the label `replica`

A replica gets requests once its models are warm. One whose devices cannot be brought back fails its health
checks, and Ray starts another in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.app import create_app
from server.launcher import prepare
from server.settings import load_settings
from server.state import Phase, ServerState

_METRICS_SECONDS = 5.0  # for all replicas to answer


def build() -> FastAPI:
    """Make the application of a replica; its start takes until the models are warm."""
    settings = load_settings()
    prepare(settings)
    app = create_app(settings)
    app.router.routes.insert(0, Route("/metrics", all_metrics))
    load = app.router.lifespan_context

    @asynccontextmanager
    async def start(inner: FastAPI) -> AsyncIterator[None]:
        async with load(inner):
            await until_ready(app.state.dd)
            yield

    app.router.lifespan_context = start
    return app


async def until_ready(state: ServerState) -> None:
    """Wait for the end of the warm-up.

    Raises:
        Exception: why there will be none.
    """
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    state.on_ready = lambda: over.set_result(None)
    state.on_failure = over.set_exception
    if state.phase is not Phase.READY:
        await over
    state.on_failure = lambda _: None  # from now on the health checks tell


async def all_metrics(request: Request) -> Response:
    """Reply with the series of every replica: the proxy would choose another one for each scrape."""
    here = serve.get_replica_context()
    handle = serve.get_deployment_handle(here.deployment, here.app_name)
    answers = await handle.broadcast("metrics").results_async(
        timeout_s=_METRICS_SECONDS, return_exceptions=True
    )
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    found = [answer for answer in answers if not isinstance(answer, BaseException)]  # one may be dying
    return Response(encode(_Merged(found)), headers={"content-type": media_type})


class _Merged:
    """The metrics of replicas, by their names, in the form of a registry."""

    def __init__(self, replicas: list[tuple[str, list[Metric]]]) -> None:
        self._families: dict[str, Metric] = {}
        for replica, metrics in replicas:
            for metric in metrics:
                new = Metric(metric.name, metric.documentation, metric.type, metric.unit)
                family = self._families.setdefault(metric.name, new)
                family.samples += [
                    s._replace(labels={**s.labels, "replica": replica}) for s in metric.samples
                ]

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._families.values()


@serve.deployment(
    num_replicas=2,
    # The server refuses by itself what it has no room for: with 429, and by work instead of by count.
    max_ongoing_requests=1000,
    health_check_period_s=5,
    # DD_SERVER_DRAIN_TIMEOUT, and 10 s for the last batch.
    graceful_shutdown_timeout_s=30,
)
@serve.ingress(build)
class Pictures:
    """A replica."""

    async def check_health(self) -> None:
        """Raise if no device process lives: Ray replaces a replica that fails three times."""
        self.app.state.dd.check_ready()

    async def metrics(self) -> tuple[str, list[Metric]]:
        """Return the name of the replica, and its metrics."""
        registry = self.app.state.dd.metrics.registry
        return serve.get_replica_context().replica_id.unique_id, list(registry.collect())


app = Pictures.bind()
