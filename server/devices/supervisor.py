"""The life of a device process: start it, talk to it, end it when it hangs, replace it when it dies.

    start ─▶ up ─▶ dies or hangs ─▶ on_lost ─▶ another starts and loads the models ─▶ up, on_restored

Nothing here waits for the process on the event loop: one that stops, in the middle of a message too, is ended
after `hang_timeout`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from server.devices import messages
from server.devices.pipe import MessagePipe
from server.devices.pixels import PixelBuffer
from server.devices.sockets import settle_socket_folder
from server.errors import ApiError, ComputeError, DeviceKilledError, UnavailableError

log = logging.getLogger("dd_server.worker")

Entry = Callable[[Connection, messages.DeviceOptions, PixelBuffer | None], None]
# A process that dies so often without finishing a pass will not get better.
_MAX_DEATHS = 5
# Signals that a process brings upon itself. Any other comes from outside: from a person, from the kernel when
# memory runs out, …
_OWN_SIGNALS = frozenset(
    {
        signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL,
        signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
    }
)  # fmt: skip
_UNSEEN = 255  # exit code of a process whose fork server was gone before it
_processes = multiprocessing.get_context("forkserver")
# The fork server imports torch once; a device process then starts in milliseconds.
PRELOAD = ["server.devices.preload"]
_processes.set_forkserver_preload(PRELOAD)
# Threads of one product wait for each other by spinning, which is fastest until somebody else wants a core:
# then a pass takes fifty times as long. See docs/decisions/0003.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "1000"


@dataclass(eq=False)
class Supervisor:
    """One device process, and its successors. All methods run on the event loop, and so do the callbacks."""

    entry: Entry  # the function that the process runs
    options: messages.DeviceOptions
    hang_timeout: float  # seconds after which a pass counts as hung, and the process as dead
    on_answer: Callable[[messages.Done | messages.Failed], None]  # to each `Forward`
    on_lost: Callable[[bool], None]  # it died, True = of itself; its pass is not answered any more
    on_restored: Callable[[float], None]  # another is up, after so many seconds
    on_failure: Callable[[Exception], None]  # it cannot be brought back

    def __post_init__(self) -> None:
        self._models: dict[str, Path] = {}
        self._loading: dict[messages.Load, asyncio.Future[None]] = {}
        self._numbers = itertools.count()
        self._process: ForkServerProcess | None = None
        self._pipe: MessagePipe | None = None
        self._pixels: PixelBuffer | None = None
        self._starting: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._passes: deque[bool] = deque()  # that were sent: True = to be watched
        self._watchdog: asyncio.TimerHandle | None = None
        self.hardware = ""  # the kind of device, as the process names it with each model
        self._deaths = 0
        self._hanging = False  # it was ended by the watchdog
        self._stopping = False

    @property
    def up(self) -> bool:
        """True while the process lives and has its models."""
        return self._pipe is not None and self._reviving is None

    @property
    def pid(self) -> int | None:
        """The process, for operators and tests."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process."""
        settle_socket_folder()
        ours, theirs = _processes.Pipe()
        self._pixels = PixelBuffer.new()
        arguments = (theirs, self.options, self._pixels)
        process = _processes.Process(target=self.entry, args=arguments, name="dd-device", daemon=True)
        self._starting = asyncio.create_task(self._begin(process, theirs))
        await asyncio.shield(self._starting)
        self._pipe = await MessagePipe.open(ours, self._receive, self._lost)

    async def _begin(self, process: ForkServerProcess, theirs: Connection) -> None:
        """Start the process. It goes on where `start` is cancelled: a thread does not end by that."""
        await asyncio.to_thread(process.start)
        theirs.close()
        self._process = process

    async def load(self, model: str, folder: Path) -> None:
        """Load a model, now and in every process that follows; if it raises, `unload` it.

        Raises:
            DDError: the bundle is damaged.
            ComputeError: the process died of itself meanwhile.
            DeviceKilledError, UnavailableError: it was killed from outside, or is being replaced.
        """
        await self._load(model, folder)
        self._models[model] = folder

    def unload(self, model: str) -> None:
        """Let the process forget a model; one that it still loads is not answered any more."""
        self._models.pop(model, None)
        for load, future in self._loading.items():
            if load.model == model:
                _resolve(future, None)
        self.send(messages.Unload(model))

    def forward(self, command: messages.Forward, watched: bool = True) -> None:
        """Send a pass, which `on_answer` follows, in the order in which they were sent, or `on_lost` for all;
        two at a time at most.

        Args:
            watched: the process is ended if the pass takes more than `hang_timeout`.
        """
        self._passes.append(watched)
        if len(self._passes) == 1:
            self._watch()
        self.send(command)

    def _watch(self) -> None:
        """Watch the pass that the process is at."""
        self._stop_watchdog()
        if self._passes and self._passes[0] and not self._stopping:
            self._watchdog = asyncio.get_running_loop().call_later(self.hang_timeout, self._hung)

    def send(self, command: messages.Command) -> None:
        """Send a command; without a process it is lost."""
        if self._pipe is not None:
            self._pipe.send(command)

    async def stop(self) -> None:
        """End the process for good, with the pass that it runs."""
        self._stopping = True
        self._stop_watchdog()
        if self._reviving is not None:
            self._reviving.cancel()
        if self._starting is not None:  # a process that starts is still given what is closed below
            await asyncio.wait({self._starting})
            self._starting.exception()  # of a start that nobody waits for
        process = self._process
        self._disconnect()
        if process is not None:
            if not is_stopped(process.pid):
                await asyncio.to_thread(process.join, 5.0)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)

    async def _load(self, model: str, folder: Path) -> None:
        if self._pipe is None:
            raise UnavailableError("the device process is being replaced", retry_after=1)
        load = messages.Load(model, folder, next(self._numbers))
        future = self._loading[load] = asyncio.get_running_loop().create_future()
        self.send(load)
        try:
            await self._watched(future)
        finally:
            del self._loading[load]

    async def _watched(self, future: asyncio.Future[None]) -> None:
        """Wait for a load, which may take long; end a process that is stopped from outside at two looks."""
        stopped = False
        while not (await asyncio.wait({future}, timeout=self.hang_timeout / 2))[0]:
            before, stopped = stopped, is_stopped(self.pid)
            if before and stopped and self._process is not None:
                log.error("the device process was stopped while it loaded a model: it is ended")
                self._process.kill()
        future.result()

    def _receive(self, answer: messages.Answer) -> None:
        if isinstance(answer, messages.Loaded):
            self.hardware = answer.hardware
            future = self._loading.get(answer.load)
            if future is not None:
                _resolve(future, answer.error)
            return
        self._passes.popleft()
        self._watch()
        if isinstance(answer, messages.Done):
            self._deaths = 0
            if self._pixels is not None and answer.placed is not None:
                answer = replace(answer, pictures=self._pixels.take(answer.placed), placed=None)
        self.on_answer(answer)

    def _hung(self) -> None:
        if self._process is not None:
            stopped = is_stopped(self._process.pid)
            cause = ", as the process was stopped from outside" if stopped else ""
            log.error(
                "a pass has taken more than %.0f s%s: the device process is ended", self.hang_timeout, cause
            )
            self._hanging = not stopped
            self._process.kill()

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _disconnect(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._pixels is not None:
            self._pixels.close()
            self._pixels = None

    def _lost(self) -> None:
        """Replace the process, which is gone."""
        self._disconnect()
        if self._stopping:
            return
        died = time.perf_counter()
        self._deaths += 1
        self._passes.clear()
        self._stop_watchdog()
        self._reviving = asyncio.get_running_loop().create_task(self._revive(died))

    async def _revive(self, died: float) -> None:
        try:
            crashed = await self._bury()
            for future in self._loading.values():
                _resolve(future, _of_load(crashed))
            self.on_lost(crashed)
            if self._deaths > _MAX_DEATHS:
                raise ComputeError(f"the device process died {self._deaths} times in a row")
            await self.start()
            for model, folder in list(self._models.items()):
                if model in self._models:
                    await self._load(model, folder)
                if model not in self._models:  # unloaded in the meantime
                    self.send(messages.Unload(model))
        except Exception as error:  # noqa: BLE001 (without a device nothing is left to do)
            if self._reviving is asyncio.current_task():  # else it died again, and the next one sees to it
                self.on_failure(error)
            return
        self._reviving = None
        seconds = time.perf_counter() - died
        log.info("the device process is back after %.2f s", seconds)
        self.on_restored(seconds)

    async def _bury(self) -> bool:
        """Wait for the end of the process that is lost; return True if it died of itself."""
        process, hanging = self._process, self._hanging
        self._hanging = False
        if process is None:
            return False
        await asyncio.to_thread(process.join, 5.0)
        code = process.exitcode
        log.error("the device process died (%s); starting another", "it hung" if hanging else described(code))
        if code is None:
            process.kill()
        return hanging or is_crash(code)


def is_crash(code: int | None) -> bool:
    """Return True for the exit code of a process that ended by its own doing, False if another ended it.

    Args:
        code: as of `multiprocessing.Process`: −n = by signal n, None = it has not ended.
    """
    if code is None or code == _UNSEEN:
        return False
    return code >= 0 or -code in _OWN_SIGNALS


def is_stopped(pid: int | None) -> bool:
    """Return True for a process that SIGSTOP, or a debugger, has stopped; False where there is no `/proc`."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2]
    except OSError:
        return False
    return state.startswith(("T", "t"))


def _of_load(crashed: bool) -> ApiError:
    """The error of a load that the process died in."""
    if crashed:
        return ComputeError("the device process died while it loaded the model")
    return DeviceKilledError.of("the device process was killed from outside while it loaded the model")


def described(code: int | None) -> str:
    """Return an exit code in words."""
    if code is None or code >= 0:
        return f"exit code {code}"
    origin = "its own doing" if is_crash(code) else "sent from outside"
    return f"signal {-code}, {signal.strsignal(-code)}: {origin}"


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():  # whoever waited has left in the meantime
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(None)
