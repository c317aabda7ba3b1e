"""A real server on a real socket, whose device process can be held, made to fail, or killed."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.managers import ListProxy
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from dd_core.bundle import Bundle
from dd_core.condition import ClassCondition, Condition, of_kind
from dd_core.layout import TokenLayout
from dd_core.models.protocols import ALL_TOKENS, Student
from server.app import create_app
from server.devices.supervisor import PRELOAD
from server.launcher import Server, bind, make_server
from server.models.catalog import ServedModel, find
from server.settings import Settings
from server.state import Phase, ServerState

PATIENCE = 120.0
OK = {"label": "ship", "seed": 7}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([*PRELOAD, "pytest", "tests.server.helpers"])


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Waits for something that another thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


@dataclass
class Latch:
    """An event between processes that outlives a waiter's death: `multiprocessing.Event` waits for it."""

    value: Any = field(default_factory=lambda: processes.Value("i", 1))

    def set(self) -> None:
        self.value.value = 1

    def clear(self) -> None:
        self.value.value = 0

    def wait(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while not self.value.value and time.monotonic() < deadline:
            time.sleep(0.002)
        return bool(self.value.value)


class Turnstile(Latch):
    """A latch that can let so many passes through and no more; for one waiter."""

    def set(self) -> None:
        self.value.value = 2**30

    def admit(self, passes: int = 1) -> None:
        with self.value.get_lock():
            self.value.value += passes

    def wait(self, timeout: float) -> bool:
        if not super().wait(timeout):
            return False
        self.admit(-1)
        return True


@dataclass
class Gate:
    """A gate before the student of a device process, worked from the test's process.

    Closed, the device is busy until it opens. The classes below are what it fails on, as a real device
    does: in the middle of a batch, and for all of it. −1 is no class.
    """

    open: Latch = field(default_factory=Latch)
    poisoned: Any = field(default_factory=lambda: processes.Value("i", -1))  # raises
    exhausting: Any = field(default_factory=lambda: processes.Value("i", -1))  # runs out of memory
    broken: Any = field(default_factory=lambda: processes.Value("i", -1))  # gives NaN in its own row
    deadly: Any = field(default_factory=lambda: processes.Value("i", -1))  # is a fault of memory
    fatal_loads: Any = field(default_factory=lambda: processes.Value("i", 0))  # so many kill the process
    most_rows: Any = field(default_factory=lambda: processes.Value("i", 10**6))  # more: out of memory
    loads: Latch = field(default_factory=Latch)  # closed, a process that loads a model waits
    calls: ListProxy[list[int]] | list[list[int]] = field(default_factory=list)

    def __call__(self, bundle: Bundle) -> Bundle:
        """What the device process does with each bundle that it loads."""
        assert bundle.sampler.student is not None
        with self.fatal_loads.get_lock():  # two processes may load at once
            fatal = self.fatal_loads.value > 0
            self.fatal_loads.value -= fatal
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        assert self.loads.wait(PATIENCE)
        student = _Gated(bundle.sampler.student, self)
        return dataclasses.replace(bundle, sampler=dataclasses.replace(bundle.sampler, student=student))


class _Gated:
    def __init__(self, student: Student, gate: Gate) -> None:
        self.student = student
        self.gate = gate

    @property
    def layout(self) -> TokenLayout:
        return self.student.layout

    @property
    def block_L(self) -> Tensor:
        return self.student.block_L

    def predict(
        self, x_BLC: Tensor, cond: Condition, step_B: Tensor, chosen: slice = ALL_TOKENS
    ) -> tuple[Tensor, Tensor]:
        labels_B, gate = of_kind(cond, ClassCondition).labels_B, self.gate
        classes = labels_B.tolist()
        gate.calls.append(classes)
        assert gate.open.wait(PATIENCE)
        if gate.deadly.value in classes:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), signal.SIGSEGV)
        if gate.exhausting.value in classes or len(classes) > gate.most_rows.value:
            raise torch.OutOfMemoryError("secret: the device is out of memory")
        if gate.poisoned.value in classes:
            raise RuntimeError("secret: the device is out of order")
        embeddings, logits = self.student.predict(x_BLC, cond, step_B, chosen)
        wrong = labels_B == gate.broken.value
        return embeddings, torch.where(wrong[:, None, None], torch.nan, logits)


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

    @property
    def pid(self) -> int:
        """The device process."""
        assert self.state.pool is not None
        [pid] = self.state.pool.pids
        assert pid is not None
        return pid

    def post(self, body: object, **headers: str) -> httpx.Response:
        return self.client.post("/generate", json=body, headers=headers)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels, whatever others."""
        samples = (s for family in self.state.metrics.registry.collect() for s in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    @property
    def depth(self) -> float:
        return self.metric("dd_queue_depth")


def busy(live: Running, gate: Gate, pool: Executor) -> Future[httpx.Response]:
    """A request that holds the device until the gate opens; returns once it is there."""
    gate.open.clear()
    gate.calls[:] = []
    reply = pool.submit(live.post, {"label": 0, "seed": 0})
    eventually(lambda: gate.calls[:] == [[0]], "the request is on the device")
    return reply


@contextmanager
def running(
    model: Path | ServedModel | list[ServedModel],
    gate: Gate | None = None,
    ready: bool = True,
    **settings: object,
) -> Iterator[Running]:
    """Serves a bundle, or models, on a free port until the block ends."""
    bound = bind("127.0.0.1", 0)
    served = [find(model)] if isinstance(model, Path) else model if isinstance(model, list) else [model]
    chosen = Settings(**{"encode_threads": 2, "threads": 1, "device": "cpu", **settings})  # type: ignore[arg-type]
    server = make_server(create_app(chosen, served, gate), chosen, bound)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        eventually(lambda: server.started, "the server listens")
        if ready:
            eventually(lambda: server.state.phase is not Phase.WARMING_UP, "the server is ready")
            assert server.state.phase is Phase.READY
        with httpx.Client(base_url=server.address, timeout=PATIENCE) as client:
            yield Running(server, client)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def refused(reply: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """Check the envelope of an error, and return its message."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "code", "message", "param"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    message = body["error"]["message"]
    assert message
    assert "Traceback" not in reply.text
    assert len(message) < 400
    return str(message)
