"""The socket, the signals and the drain.

bind → load (app's lifespan) → listen, warming up → ready → SIGTERM → drain, bounded → exit
"""

from __future__ import annotations

import logging
import socket
import sys
from types import FrameType

import uvicorn

from dd_core.bundle import Bundle
from dd_core.errors import InvalidRequestError
from server.app import create_app
from server.errors import ComputeError
from server.settings import Settings
from server.state import ServerState

log = logging.getLogger("dd_server")


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused until the model is loaded.

    Raises:
        InvalidRequestError: the address is taken or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _unusable(host, port, error) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _unusable(host, port, error) from None
    return bound


def _unusable(host: str, port: int, error: OSError) -> InvalidRequestError:
    return InvalidRequestError(f"cannot listen on {host}:{port}: {error.strerror or error}", param="port")


class Server(uvicorn.Server):
    """uvicorn with our drain: the first signal refuses new work and lets running requests end,
    the second one does not wait; either way the process ends by returning, not by the signal.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, address: str) -> None:
        super().__init__(config)
        self.state = state
        self.address = address
        self.failure: Exception | None = None
        state.on_ready = lambda: log.info("ready")
        state.on_failure = self._fail

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit:
            self.force_exit = True
            return
        self.state.drain()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.state.drain()
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.info("listening on %s (%s)", self.address, self.state.phase.value)


def make_server(settings: Settings, bundle: Bundle, bound: socket.socket) -> Server:
    """A server of `bundle` for a socket from `bind`; `run(sockets=[bound])` runs it.

    Raises:
        InvalidPlanError: the bundle offers no plan.
    """
    app = create_app(settings, bundle)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=settings.access_log,
        timeout_graceful_shutdown=settings.drain_timeout,  # type: ignore[arg-type]
        server_header=False,
        lifespan="on",
        ws="none",
    )
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return Server(config, app.state.dd, f"http://{shown}:{port}")


def serve(settings: Settings, bundle: Bundle, bound: socket.socket) -> None:
    """Serve `bundle` on `bound` until a signal; returns after the drain.

    Raises:
        InvalidPlanError: the bundle offers no plan.
        ComputeError: the warm-up failed.
    """
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # Ours says when the server listens and what it does; uvicorn's own lines repeat it.
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    server = make_server(settings, bundle, bound)
    server.run(sockets=[bound])
    if server.failure is not None:
        raise ComputeError(f"warm-up failed: {server.failure}") from server.failure
    log.info("stopped")
