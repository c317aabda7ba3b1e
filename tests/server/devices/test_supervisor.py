"""What the end of a device process says of the work that it was at; an end in the middle of a start."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import Any

import pytest

from server.devices import messages, supervisor
from server.devices.supervisor import Supervisor, described, is_crash
from tests.server.helpers import PATIENCE


@pytest.mark.parametrize(
    "code", [0, 1, 70, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL]
)
def test_a_process_that_ends_by_itself_crashed(code: int) -> None:
    assert is_crash(code)


@pytest.mark.parametrize(
    "code", [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGRTMIN, 255, None]
)
def test_a_process_that_was_ended_or_whose_end_was_not_seen_did_not_crash(code: int | None) -> None:
    assert not is_crash(code)


def test_an_end_is_described_with_its_origin() -> None:
    assert described(-signal.SIGKILL) == "signal 9, Killed: sent from outside"
    assert described(-signal.SIGSEGV) == "signal 11, Segmentation fault: its own doing"
    assert described(1) == "exit code 1"


def test_an_end_waits_for_a_process_that_starts_and_is_still_given_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A start goes on in its thread: with its descriptors closed the process would end with a traceback."""
    entered, go_on = threading.Event(), threading.Event()
    happened: list[str] = []

    class Slow:
        """A process that takes its time to be started; its arguments are given to it at the end."""

        pid, exitcode = None, 0

        def __init__(self, args: tuple[Any, ...], **_: Any) -> None:
            self.file = args[2]._file

        def start(self) -> None:
            entered.set()
            assert go_on.wait(PATIENCE)
            os.fstat(self.file)
            happened.append("started")

        def join(self, timeout: float = 0) -> None:
            happened.append("joined")

        def is_alive(self) -> bool:
            return False

    async def run() -> None:
        options = messages.DeviceOptions("cpu", 1)
        nothing: Any = lambda *_: None  # noqa: E731
        starts = Supervisor(nothing, options, 60.0, nothing, nothing, nothing, nothing)
        starting = asyncio.create_task(starts.start())
        await asyncio.to_thread(entered.wait, PATIENCE)
        starting.cancel()
        stopping = asyncio.create_task(starts.stop())
        await asyncio.wait({stopping}, timeout=0.05)
        assert not stopping.done()
        go_on.set()
        await stopping

    monkeypatch.setattr(supervisor._processes, "Process", Slow)
    asyncio.run(run())
    assert happened == ["started", "joined"]


def test_each_of_two_passes_is_watched_from_its_beginning_on() -> None:
    """The second from the answer to the first, which is not given more time by it."""

    async def run() -> None:
        nothing: Any = lambda *_: None  # noqa: E731
        passes = Supervisor(
            nothing, messages.DeviceOptions("cuda:0"), 60.0, nothing, nothing, nothing, nothing
        )
        command = messages.Forward("any", "student", (1,), (0,), 1)
        passes.forward(command)
        first = passes._watchdog
        passes.forward(command)
        assert first is not None and passes._watchdog is first and not first.cancelled()
        passes._receive(messages.Done(0.1, 0.0, {}))
        second = passes._watchdog
        assert second is not None and first.cancelled() and second.when() > first.when()
        passes._receive(messages.Failed(False, "any"))
        assert second.cancelled()

    asyncio.run(run())
