"""The socket, the signals and the drain of the process that serves.

bind → find the models → load (app's lifespan) → listen, warming up → ready → SIGTERM → drain, bounded → exit
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dd_core.errors import DDError, InvalidRequestError
from server.devices.sockets import settle_socket_folder
from server.errors import ComputeError, DrainingError
from server.middleware.auth import read_keys
from server.middleware.connection import BoundedProtocol, protocol
from server.models.catalog import ServedModel, find_all
from server.observability import logs
from server.observability.tracing import require_sdk
from server.settings import Settings, unknown_variables
from server.state import ServerState

log = logging.getLogger("dd_server")
# Seconds beyond the drain in which requests that were given up send what they have to say.
_GRACE = 1.0


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket that does not listen yet: clients are refused until the model is loaded.

    Raises:
        InvalidRequestError: the address is taken or not of this machine.
    """
    with ExitStack() as after_an_error:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = after_an_error.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            message = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise InvalidRequestError(message, param="port") from None
        after_an_error.pop_all()
    return bound


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
        self.state.loads.end_all()
        patience = self.state.settings.drain_timeout
        giving_up = asyncio.get_running_loop().call_later(patience, self._give_up)
        await super().shutdown(sockets)
        giving_up.cancel()

    def _give_up(self) -> None:
        self.state.give_up()
        for connection in list(self.server_state.connections):
            if isinstance(connection, BoundedProtocol):
                connection.end_unfinished(DrainingError("the server is shutting down", retry_after=1))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            log.info("listening on %s (%s)", self.address, self.state.phase.value)


def make_server(app: FastAPI, settings: Settings, bound: socket.socket) -> Server:
    """Make a server of `app` for a socket from `bind`; `run(sockets=[bound])` runs it."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        http=protocol(settings, app.state.dd.metrics),
        # uvicorn would take uvloop where it is installed: it gained nothing (docs/decisions/0004), and it is
        # not tested.
        loop="asyncio",
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]
        proxy_headers=False,  # server.middleware.proxies reads them
        timeout_graceful_shutdown=settings.drain_timeout + _GRACE,  # type: ignore[arg-type]
        server_header=False,
        lifespan="on",
        ws="none",
    )
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return Server(config, app.state.dd, f"http://{shown}:{port}")


def prepare(settings: Settings) -> None:
    """Set up logging and find quick mistakes, before a model is fetched and loaded.

    Raises:
        InvalidRequestError: a file of keys cannot be used, tracing is not installed, or there is no place for
            sockets.
    """
    logs.configure(settings.log_level, settings.log_format)
    for line in unknown_variables(os.environ):
        log.warning("%s", line)
    read_keys(settings)
    settle_socket_folder()
    if settings.otel_endpoint:
        require_sdk()


def find_served(sources: Sequence[str]) -> list[ServedModel]:
    """Find the models to serve, which takes long where they are fetched; SIGTERM ends the process at once.

    Raises: as `find_all`.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        log.info("stopped before the models were found")
        logging.shutdown()
        os._exit(0)

    # The first process of a container does not end by a signal that it does not handle.
    before = signal.signal(signal.SIGTERM, end)
    found: Future[list[ServedModel]] = Future()

    def find() -> None:
        try:
            found.set_result(find_all(sources))
        except BaseException as error:  # noqa: BLE001 (raised by `result`)
            found.set_exception(error)

    try:
        # This thread waits where signals are handled, which a read of a file need not do.
        threading.Thread(target=find, name="dd-find", daemon=True).start()
        return found.result()
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_file_limit() -> None:
    """Let this process have as many open files as it may ask for; the usual 1,024 are a default of old."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(app: FastAPI, settings: Settings, bound: socket.socket) -> None:
    """Serve `app` on `bound` until a signal, after `prepare`; return after the drain.

    Raises:
        DDError: a bundle is damaged, the warm-up failed, or a device process could not be replaced.
    """
    _raise_file_limit()
    server = make_server(app, settings, bound)
    # Modules stay until the end: a full collection that read all of them would hold the event loop for 0.1 s.
    gc.collect()
    gc.freeze()
    server.run(sockets=[bound])
    if server.failure is not None:
        if isinstance(server.failure, DDError):
            raise server.failure
        raise ComputeError(f"the server failed: {server.failure}") from server.failure
    log.info("stopped")
