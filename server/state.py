"""What the routes of one application share."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from server.catalog import Catalog
from server.errors import DrainingError, UnavailableError
from server.images import Encoder
from server.metrics import Metrics
from server.settings import Settings
from server.worker import DeviceWorker


class Phase(enum.Enum):
    """A server goes through these once, in this order; `failed` ends it."""

    LOADING = "loading"
    WARMING_UP = "warming up"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass
class ServerState:
    """Settings, models, the worker and the phase of one application."""

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    phase: Phase = Phase.LOADING
    catalog: Catalog | None = None
    worker: DeviceWorker | None = None
    encoder: Encoder | None = None
    # Set by whoever runs the process: called when warm-up is over.
    on_ready: Callable[[], None] = lambda: None
    on_failure: Callable[[Exception], None] = lambda _: None

    def enter(self, phase: Phase) -> None:
        """Move on; the `dd_ready` gauge follows."""
        self.phase = phase
        self.metrics.ready.set(phase is Phase.READY)

    def drain(self) -> None:
        """Refuse new work from now on."""
        self.enter(Phase.DRAINING)

    def models(self) -> Catalog:
        """The loaded models.

        Raises:
            UnavailableError: not loaded yet.
        """
        if self.catalog is None:
            raise UnavailableError("the model is being loaded", retry_after=1)
        return self.catalog

    def engine(self) -> tuple[DeviceWorker, Encoder]:
        """The parts that make images.

        Raises:
            UnavailableError: loading or warming up.
            DrainingError: shutting down.
        """
        if self.phase is Phase.DRAINING:
            raise DrainingError("the server is shutting down", retry_after=1)
        if self.phase is not Phase.READY or self.worker is None or self.encoder is None:
            raise UnavailableError(f"the server is not ready: {self.phase.value}", retry_after=1)
        return self.worker, self.encoder


def state_of(request: Request) -> ServerState:
    """The state of the application that handles `request`."""
    return cast(ServerState, request.app.state.dd)
