"""The state that the routes of one application share."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from server.devices.loads import Loads
from server.devices.pool import DevicePool
from server.errors import DrainingError, UnavailableError
from server.generation.encoder import Encoder
from server.models.catalog import Catalog
from server.observability.metrics import Metrics
from server.settings import Settings


class Phase(enum.Enum):
    """A server goes through these once, in this order; `failed` ends it."""

    LOADING = "loading"
    WARMING_UP = "warming up"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass
class ServerState:
    """Settings, models, devices and the phase of one application."""

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    phase: Phase = Phase.LOADING
    catalog: Catalog = field(init=False)
    pool: DevicePool | None = None
    encoder: Encoder | None = None
    loads: Loads = field(init=False)
    # Set by whoever runs the process: called when warm-up is over, and when nothing helps any more.
    on_ready: Callable[[], None] = lambda: None
    on_failure: Callable[[Exception], None] = lambda _: None

    def __post_init__(self) -> None:
        self.catalog = Catalog(self.settings.aliases)
        self.loads = Loads(self.settings, self.catalog, self.metrics)

    def enter(self, phase: Phase) -> None:
        """Move on; the `dd_ready` gauge follows."""
        self.phase = phase
        self.measure_readiness()

    def measure_readiness(self) -> None:
        """Set `dd_ready`: the server is unready while all its device processes are being replaced."""
        self.metrics.ready.set(self.phase is Phase.READY and self.pool is not None and self.pool.up)

    def fail(self, error: Exception) -> None:
        """Nothing can be made any more: the process should end."""
        self.enter(Phase.FAILED)
        self.on_failure(error)

    def drain(self) -> None:
        """Refuse new work from now on."""
        self.enter(Phase.DRAINING)

    def give_up(self) -> None:
        """End what still runs at the end of a drain, with an error that says so."""
        if self.pool is not None:
            self.pool.end_all()

    def models(self) -> Catalog:
        """Return the loaded models.

        Raises:
            UnavailableError: not loaded yet.
        """
        if not self.catalog.models and self.phase in (Phase.LOADING, Phase.WARMING_UP):
            raise UnavailableError("the model is being loaded", retry_after=1)
        return self.catalog

    def accepting(self) -> tuple[DevicePool, Encoder]:
        """Return the parts that make images.

        Raises:
            UnavailableError: loading or warming up.
            DrainingError: shutting down.
        """
        if self.phase is Phase.DRAINING:
            raise DrainingError("the server is shutting down", retry_after=1)
        if self.phase is not Phase.READY or self.pool is None or self.encoder is None:
            raise UnavailableError(f"the server is not ready: {self.phase.value}", retry_after=1)
        return self.pool, self.encoder

    def check_ready(self) -> None:
        """Check that new clients should be sent here. While all device processes are being replaced,
        requests are still taken, but a balancer had better send them elsewhere.

        Raises:
            UnavailableError: not `accepting`, or no device process lives.
        """
        pool, _ = self.accepting()
        if not pool.up:
            raise UnavailableError("every device process is being replaced", retry_after=1)


def state_of(request: Request) -> ServerState:
    """The state of the application that handles `request`."""
    return cast(ServerState, request.app.state.dd)
