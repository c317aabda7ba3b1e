"""The server's end of a device process: sends passes, settles requests, starts it again when it dies.

    event loop                                            device process (server/devices/process.py)
    submit(job) ─ Scheduler.admit ─▶ take() ─ Forward ──▶ one pass
    await future ◀── pixels ◀── finish() ◀───── Done ───┘

Everything here runs on the event loop, so the scheduler needs no lock. A pass that fails is halved until
the guilty image is alone; a process that dies is replaced, and what it was at work on is sent
again: nothing that was accepted is lost.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import multiprocessing.connection
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from server.devices import process as device
from server.devices.messages import (
    Answer,
    Command,
    DeviceOptions,
    Done,
    Drop,
    Failed,
    Forward,
    Load,
    Loaded,
    NewImage,
    Unload,
)
from server.devices.warmup import Step, warm_up
from server.errors import (
    ComputeError,
    DeadlineError,
    DeadlineUnreachableError,
    DrainingError,
    OutOfMemoryError,
    QueueFullError,
)
from server.generation.encoder import Pixels
from server.observability.metrics import Metrics
from server.scheduling.backlog import Forecast
from server.scheduling.jobs import Batch, Job
from server.scheduling.scheduler import Scheduler

log = logging.getLogger("dd_server.worker")

# A process that dies so often without finishing a pass will not get better.
_MOST_DEATHS = 5
_processes = multiprocessing.get_context("forkserver")
# The fork server imports torch once; a device process then starts in milliseconds.
PRELOAD = ["server.devices.preload"]
_processes.set_forkserver_preload(PRELOAD)
# Threads of one product wait for each other by spinning, which is fastest until somebody else wants a core:
# then a pass takes fifty times as long. See docs/decisions/0003.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "1000"


# Told of each picture as it comes: the image's place in its job, its pixels, and whether it is finished.
Watch = Callable[[int, Pixels, bool], None]


@dataclass(eq=False)
class _Pending:
    """Where a job's pixels go."""

    future: asyncio.Future[list[Pixels]]
    watch: Watch | None = None
    pixels: dict[int, Pixels] = field(default_factory=dict)


@dataclass(eq=False)
class _InFlight:
    """The command that the device is at."""

    command: Forward
    at: float
    expected: float
    work: Batch | asyncio.Future[Done | Failed]


class DeviceWorker:
    """One device process and its queue.

    Args:
        options: how it computes.
        scheduler: its queue; nobody else may touch it.
        metrics: where passes and waiting are counted.
        hang_timeout: seconds after which a pass counts as hung, and the process as dead.
        on_change: called when the process dies, and when it is back.
        on_failure: called when it cannot be brought back.
    """

    def __init__(
        self,
        options: DeviceOptions,
        scheduler: Scheduler,
        metrics: Metrics,
        *,
        hang_timeout: float,
        on_change: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._options = options
        self._scheduler = scheduler
        self._metrics = metrics
        self._hang_timeout = hang_timeout
        self._on_change = on_change
        self._on_failure = on_failure
        self._models: dict[str, Path] = {}
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._pending: dict[Job, _Pending] = {}
        self._reserved: deque[tuple[Forward, asyncio.Future[Done | Failed]]] = deque()
        self._in_flight: _InFlight | None = None
        self._process: ForkServerProcess | None = None
        self._connection: multiprocessing.connection.Connection | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        self._watchdog: asyncio.TimerHandle | None = None
        self._deaths = 0
        self._stopping = False

    @property
    def up(self) -> bool:
        """Whether the process lives and has its models."""
        return self._connection is not None and self._reviving is None

    @property
    def pid(self) -> int | None:
        """The process, for operators and tests."""
        return self._process.pid if self._process is not None else None

    @property
    def backlog(self) -> float:
        """Seconds of work that wait here."""
        return self._scheduler.backlog.seconds() + self._busy_seconds()

    @property
    def depth(self) -> int:
        """Images that wait here."""
        return self._scheduler.depth

    async def start(self) -> None:
        """Start the process."""
        ours, theirs = _processes.Pipe()
        process = _processes.Process(
            target=device.main, args=(theirs, self._options), name="dd-device", daemon=True
        )
        await asyncio.to_thread(process.start)
        theirs.close()
        self._process, self._connection = process, ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable)

    async def load(self, model: str, folder: Path, steps: Sequence[Step], condition: int | str) -> None:
        """Load a model and warm it up; after an error, `unload` it.

        Args:
            steps: what to run in every size of batch.
            condition: any that the model takes.

        Raises:
            DDError: the bundle is damaged, or the first pass fails.
        """
        await self._load(model, folder)
        self._models[model] = folder
        await warm_up(steps, condition, self._scheduler.costs, self)

    async def unload(self, model: str) -> None:
        """Forget a model once its requests are over; nobody may ask for it any more."""
        while waiting := [t.future for job, t in self._pending.items() if job.model == model]:
            await asyncio.wait(waiting)
        self._models.pop(model, None)
        self._scheduler.costs.forget(model)
        self._send(Unload(model))

    async def run(self, command: Forward) -> Done | Failed:
        """Run a pass that no request asked for, ahead of those that wait."""
        future: asyncio.Future[Done | Failed] = asyncio.get_running_loop().create_future()
        self._reserved.append((command, future))
        self._dispatch_next()
        return await future

    def drop(self, numbers: Sequence[int]) -> None:
        """Let the device forget images and cohorts."""
        self._send(Drop(tuple(numbers)))

    def forecast(self, job: Job) -> Forecast:
        """Seconds until `job` would start and be done, were it submitted now."""
        return self._scheduler.forecast(job, self._busy_seconds())

    def submit(self, job: Job, watch: Watch | None = None) -> asyncio.Future[list[Pixels]]:
        """Queue a job; the future gives its images `[H, W, 3]` uint8 in order of their index.

        Args:
            watch: told of each picture as it comes, and of previews where the job asks for them.

        Raises:
            QueueFullError, DeadlineUnreachableError, DrainingError: refused; says when to come again.
        """
        if self._stopping:
            raise DrainingError("the server is shutting down", retry_after=1)
        refusal = self._scheduler.admit(job, time.perf_counter(), self._busy_seconds())
        if refusal is not None:
            waiting = f"{self._scheduler.depth} images wait already"
            if refusal.reason == "full":
                raise QueueFullError.after(
                    refusal.start, f"{waiting}, of at most {self._scheduler.queue_size}"
                )
            raise DeadlineUnreachableError.after(
                refusal.start,
                f"{waiting}: this request would start in {1e3 * refusal.start:.0f} ms and be done in "
                f"{1e3 * refusal.finish:.0f} ms, after its deadline_ms",
            )
        future: asyncio.Future[list[Pixels]] = asyncio.get_running_loop().create_future()
        self._pending[job] = _Pending(future, watch)
        self._dispatch_next()
        self._set_alarm()
        return future

    def cancel(self, job: Job) -> None:
        """Forget a job whose client has left; harmless for one that is over."""
        if self._pending.pop(job, None) is not None:
            self._scheduler.end(job)

    async def stop(self) -> None:
        """Refuse what waits and end the process, with the pass that it runs."""
        self._stopping = True
        for job in self._scheduler.jobs:
            self._end(job, DrainingError("the server shut down before it came to this", retry_after=1))
        for timer in (self._alarm, self._watchdog, self._reviving):
            if timer is not None:
                timer.cancel()
        process = self._process
        self._disconnect()
        if process is not None:
            await asyncio.to_thread(process.join, 5.0)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)

    def _busy_seconds(self) -> float:
        if self._in_flight is None:
            return 0.0
        return max(0.0, self._in_flight.at + self._in_flight.expected - time.perf_counter())

    async def _load(self, model: str, folder: Path) -> None:
        if self._connection is None:
            raise ComputeError("the device process is being replaced; try again in a moment")
        future = self._loading[model] = asyncio.get_running_loop().create_future()
        self._send(Load(model, folder))
        try:
            await future
        finally:
            self._loading.pop(model, None)

    def _send(self, command: Command) -> None:
        if self._connection is None:
            return
        try:
            self._connection.send(command)
        except OSError:
            self._lost()

    def _dispatch_next(self) -> None:
        """Give the device its next pass, if it is free."""
        if self._in_flight is None and self.up:
            if self._reserved:
                command, future = self._reserved.popleft()
                self._dispatch(command, 0.0, future)
            else:
                self._expire()
                if self._scheduler.dropped:
                    dropped, self._scheduler.dropped = self._scheduler.dropped, []
                    self.drop(dropped)
                work = self._scheduler.next_batch()
                if work is not None:
                    self._dispatch(command_of(work), self._scheduler.expected(work), work)

    def _dispatch(
        self, command: Forward, expected: float, work: Batch | asyncio.Future[Done | Failed]
    ) -> None:
        self._in_flight = _InFlight(command, time.perf_counter(), expected, work)
        loop = asyncio.get_running_loop()
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = loop.call_later(self._hang_timeout, self._hung)
        self._send(command)

    def _readable(self) -> None:
        connection = self._connection
        if connection is None:
            return
        try:  # one answer a call, without asking whether there is another: the loop calls again
            self._on_answer(connection.recv())
        except (EOFError, OSError):  # the process has closed its end
            self._lost()

    def _on_answer(self, answer: Answer) -> None:
        if isinstance(answer, Loaded):
            future = self._loading.get(answer.model)
            if future is not None and not future.done():
                _resolve(future, answer.error)
            return
        sent, self._in_flight = self._in_flight, None
        if self._watchdog is not None:
            self._watchdog.cancel()
        assert sent is not None, "an answer without a question"
        if isinstance(sent.work, asyncio.Future):
            self._scheduler.interrupted()
            if not sent.work.done():
                sent.work.set_result(answer)
        elif isinstance(answer, Done):
            self._deaths = 0
            self._finish(sent.work, answer)
        else:
            images = len(sent.work.samples)
            log.warning("a pass of %d images failed (%s): its halves are tried", images, answer.reason)
            guilty = self._scheduler.split(sent.work, out_of_memory=answer.out_of_memory)
            if guilty is not None:
                kind = OutOfMemoryError if answer.out_of_memory else ComputeError
                self._end(guilty, kind("the device failed on this request; the server's log says why"))
        self._dispatch_next()

    def _finish(self, work: Batch, answer: Done) -> None:
        by_number = {s.number: s for s in work.samples}
        watched: list[tuple[Job, Watch, int, Pixels, bool]] = []
        for number, picture in answer.pictures.items():
            sample = by_number[number]
            ticket = self._pending.get(sample.job)
            if ticket is not None:
                ticket.pixels[sample.index] = picture  # a preview is replaced by what comes of it
                if ticket.watch is not None:
                    watched.append((sample.job, ticket.watch, sample.index, picture, sample.last))
        discarded, decoded = sum(s.job.over for s in work.samples), len(work.decoding)
        for number in answer.broken:
            log.error("an image of %s came out as no number", work.work.model)
            self._end(by_number[number].job, ComputeError("the model's output is not a number"))
        now = time.perf_counter()
        times = (answer.seconds, answer.decode_seconds, now, answer.text_seconds)
        for job in self._scheduler.finish(work, *times):
            self._metrics.queue_wait.observe(job.queue_s)
            over = self._pending.pop(job)
            if not over.future.done():
                over.future.set_result([over.pixels[index] for index in range(job.count)])
        for job, watch, index, picture, last in watched:  # now that the job's times are up to date
            job.finished = now
            watch(index, picture, last)
        model, kind, _ = work.work
        if answer.text_seconds:
            self._metrics.text_encode.observe(answer.text_seconds)
        if kind != "decode":
            self._metrics.executed(model, kind, len(work.samples), answer.seconds)
        if decoded:
            self._metrics.executed(model, "decode", decoded, answer.decode_seconds)
        if discarded:
            lost = (answer.seconds + answer.decode_seconds) * discarded / len(work.samples)
            self._metrics.discarded.inc(lost)

    def _end(self, job: Job, error: Exception) -> None:
        """Answer a job with an error."""
        self._scheduler.end(job)
        ticket = self._pending.pop(job, None)
        if ticket is not None:
            _resolve(ticket.future, error)

    def _expire(self) -> None:
        for job in self._scheduler.expired(time.perf_counter()):
            self._end(job, DeadlineError("the images could not be done within deadline_ms"))
        self._set_alarm()

    def _set_alarm(self) -> None:
        """Wake up at the next deadline."""
        deadline = self._scheduler.next_deadline
        if self._alarm is not None and (deadline is None or deadline < self._alarm_at):
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None and deadline is not None:  # one that is too early does no harm
            delay = max(0.0, deadline - time.perf_counter())
            self._alarm, self._alarm_at = asyncio.get_running_loop().call_later(delay, self._ring), deadline

    def _ring(self) -> None:
        self._alarm = None
        self._expire()

    def _hung(self) -> None:
        if self._process is not None:
            log.error("a pass has taken more than %.0f s: the device process is ended", self._hang_timeout)
            self._process.kill()

    def _disconnect(self) -> None:
        if self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._connection.close()
            self._connection = None

    def _lost(self) -> None:
        """The process is gone. Everything that it had is sent again to the next one."""
        self._disconnect()
        if self._stopping:
            return
        died = time.perf_counter()
        self._deaths += 1
        if self._watchdog is not None:
            self._watchdog.cancel()
        sent, self._in_flight = self._in_flight, None
        if sent is not None and isinstance(sent.work, asyncio.Future) and not sent.work.done():
            sent.work.set_result(Failed(False, "the device process died"))
        for future in self._loading.values():
            _resolve(future, ComputeError("the device process died while it loaded the model"))
        for job in self._scheduler.restart():
            self._end(job, ComputeError("the device process died on this request, twice"))
        self._metrics.worker_restarts.inc()
        self._reviving = asyncio.get_running_loop().create_task(self._revive(died))
        self._on_change()

    async def _revive(self, died: float) -> None:
        process = self._process
        try:
            if process is not None:
                await asyncio.to_thread(process.join, 5.0)
                log.error("the device process died (exit code %s); starting another", process.exitcode)
            if self._deaths > _MOST_DEATHS:
                raise ComputeError(f"the device process died {self._deaths} times in a row")
            await self.start()
            for model, folder in list(self._models.items()):
                if model in self._models:
                    await self._load(model, folder)
                if model not in self._models:  # unloaded in the meantime
                    self._send(Unload(model))
        except Exception as error:  # noqa: BLE001 (without a device nothing is left to do)
            if self._reviving is asyncio.current_task():  # else it died again, and the next one sees to it
                self._on_failure(error)
            return
        self._reviving = None
        seconds = time.perf_counter() - died
        self._metrics.worker_recovery.observe(seconds)
        log.info("the device process is back after %.2f s", seconds)
        self._on_change()
        self._dispatch_next()


def command_of(work: Batch) -> Forward:
    """A pass as the device is told it."""
    return Forward(
        work.work.model,
        work.work.kind,
        tuple(s.number for s in work.samples),
        tuple(s.at.segment for s in work.samples),
        work.bucket,
        new=tuple(NewImage(s.number, s.job.plan, s.job.condition, s.job.keys[s.index]) for s in work.new),
        teacher_batch=work.teacher_batch.number if work.teacher_batch is not None else None,
        finishing=tuple(s.number for s in work.finishing),
        previewing=tuple(s.number for s in work.previewing),
    )


def _resolve(future: asyncio.Future[None] | asyncio.Future[list[Pixels]], error: Exception | None) -> None:
    if future.done():  # whoever waited has left in the meantime
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(None)  # type: ignore[arg-type]
