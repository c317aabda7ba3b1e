"""A real server on a real socket, with a real model whose device can be held or made to fail."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from torch import Tensor

from dd_core.bundle import Bundle
from dd_core.layout import TokenLayout
from dd_core.models.protocols import Student
from server.listen import Server, bind, make_server
from server.settings import Settings
from server.state import Phase, ServerState

PATIENCE = 120.0


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Waits for something that another thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


class Gate:
    """The real student behind a gate: closed, the device is busy until it opens.

    `poisoned` is a class index on which the device fails, as a real one does when it runs out
    of memory: in the middle of a batch, and for all of it.
    """

    def __init__(self, student: Student) -> None:
        self.student = student
        self.open = threading.Event()
        self.open.set()
        self.poisoned: int | None = None
        self.calls: list[list[int]] = []

    @property
    def layout(self) -> TokenLayout:
        return self.student.layout

    def predict(self, x_BLC: Tensor, cond_B: Tensor, step_B: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(cond_B.tolist())
        assert self.open.wait(PATIENCE)
        if self.poisoned in cond_B.tolist():
            raise RuntimeError("secret: the device is out of memory")
        return self.student.predict(x_BLC, cond_B, step_B)


def gated(bundle: Bundle) -> tuple[Bundle, Gate]:
    """The bundle with its student behind a gate."""
    assert bundle.sampler.student is not None
    gate = Gate(bundle.sampler.student)
    return dataclasses.replace(bundle, sampler=dataclasses.replace(bundle.sampler, student=gate)), gate


@dataclass
class Running:
    """A server that runs, and a client of it."""

    server: Server
    client: httpx.Client

    @property
    def url(self) -> str:
        return self.server.address

    @property
    def state(self) -> ServerState:
        return self.server.state

    def post(self, body: object, **headers: str) -> httpx.Response:
        return self.client.post("/generate", json=body, headers=headers)

    def metric(self, name: str, **labels: str) -> float:
        return self.state.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def depth(self) -> float:
        return self.metric("dd_queue_depth")


def busy(live: Running, gate: Gate, pool: Executor) -> Future[httpx.Response]:
    """A request that holds the device until the gate opens; returns once it is there."""
    gate.open.clear()
    gate.calls.clear()
    reply = pool.submit(live.post, {"label": 0, "seed": 0})
    eventually(lambda: gate.calls == [[0]], "the request is on the device")
    return reply


@contextmanager
def running(bundle: Bundle, ready: bool = True, **settings: object) -> Iterator[Running]:
    """Serves `bundle` on a free port until the block ends."""
    bound = bind("127.0.0.1", 0)
    server = make_server(Settings(encode_threads=2, **settings), bundle, bound)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        eventually(lambda: server.started, "the server listens")
        if ready:
            eventually(lambda: server.state.phase is Phase.READY, "the server is ready")
        with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
            yield Running(server, client)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
