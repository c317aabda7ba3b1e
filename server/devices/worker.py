"""A device and its queue: admits jobs, sends their passes in order, delivers their pictures.

    event loop                                                     device process (server/devices/process.py)
    submit(job) ─ Scheduler.admit ─▶ next_batch() ─ Forward ────▶ one pass
    Submission ◀─ deliver ── Scheduler.finish() ◀──────── Done ───┘

Everything here runs on the event loop, so the scheduler needs no lock. A pass that fails is halved until
the guilty image is alone; when the process dies, its successor (see `Supervisor`) is sent its work again, but
for a request that it died on too often (see `Scheduler.restart`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from server import errors
from server.devices import process
from server.devices.in_flight import InFlight, Reply, Source
from server.devices.messages import DeviceOptions, Done, Drop, Failed, Foresee, Forward, NewImage, Pixels
from server.devices.submission import Submission
from server.devices.supervisor import Supervisor
from server.devices.warmup import WarmupPass, warm_up
from server.observability.metrics import Metrics
from server.scheduling.backlog import Forecast
from server.scheduling.costs import Work, WorkCosts
from server.scheduling.jobs import Batch, Job, Sample
from server.scheduling.scheduler import Scheduler

log = logging.getLogger("dd_server.worker")


@dataclass(eq=False)
class DeviceWorker:
    """One device process and its queue."""

    name: str  # of the device, in metrics
    options: DeviceOptions
    scheduler: Scheduler  # nobody else may touch it
    metrics: Metrics
    hang_timeout: float  # seconds after which a pass counts as hung, and the process as dead
    on_change: Callable[[], None]  # the process died, or is back
    on_failure: Callable[[Exception], None]  # it cannot be brought back

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(
            process.main,
            self.options,
            self.hang_timeout,
            on_answer=self._on_answer,
            on_lost=self._on_lost,
            on_restored=self._on_restored,
            on_failure=self.on_failure,
        )
        self._pending: dict[Job, Submission] = {}
        self._settled = asyncio.Event()  # set whenever a job is over
        self._reserved: deque[tuple[Forward, Reply]] = deque()
        # Of images of the warm-up: below zero, so that no image of a request has them.
        self._warmup_numbers = itertools.count(-1, -1)
        self._in_flight = InFlight(ahead=self._on_gpu)
        self._next_timer: asyncio.TimerHandle | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._deadline_at = 0.0
        self._stopping = False
        self._busy = self.metrics.device_busy.labels(self.name)
        self._restarts = self.metrics.worker_restarts.labels(self.name)

    @property
    def _on_gpu(self) -> bool:
        return self.options.device.startswith("cuda")

    @property
    def up(self) -> bool:
        """True while the process lives and has its models."""
        return self.supervisor.up

    @property
    def backlog(self) -> float:
        """Seconds of work that wait here."""
        return self.scheduler.backlog.seconds() + self._in_flight.left

    @property
    def ahead(self) -> float:
        """Seconds until all that waits here is done, by the pace of late."""
        return self.scheduler.ahead(self._in_flight.left)

    @property
    def depth(self) -> int:
        """Images that wait here."""
        return self.scheduler.depth

    @property
    def room(self) -> int:
        """Images that the queue would still take."""
        return self.scheduler.queue_size - self.scheduler.depth

    async def load(self, model: str, folder: Path) -> float:
        """Load a model and return the seconds that it took; after an error, or a cancellation, `forget` it.

        Raises:
            DDError: the bundle is damaged, or somebody ends the process.
        """
        began = time.perf_counter()
        await self.supervisor.load(model, folder)
        return time.perf_counter() - began

    async def warm_up(
        self, passes: Sequence[WarmupPass], condition: int | str, kept: MutableMapping[Work, WorkCosts]
    ) -> float:
        """Warm up a model that is loaded and return the seconds that it took.

        Args:
            passes, condition, kept: as for `warm_up`.

        Raises:
            DDError: the first pass fails, or somebody ends the process.
        """
        began = time.perf_counter()
        costs, numbers = self.scheduler.costs, self._warmup_numbers
        await warm_up(passes, condition, costs, self, numbers, kept, every_size=self._on_gpu)
        return time.perf_counter() - began

    async def unload(self, model: str) -> None:
        """Forget a model once its requests are over; nobody may ask for it any more."""
        while any(job.model == model for job in self._pending):
            self._settled.clear()
            await self._settled.wait()
        self.forget(model)

    def forget(self, model: str) -> None:
        """Forget a model that has no requests, loaded or half loaded."""
        self.scheduler.costs.forget(model)
        self.supervisor.unload(model)

    async def run(self, command: Forward) -> Done | Failed:
        """Run a pass that no request asked for, ahead of those that wait."""
        reply: Reply = asyncio.get_running_loop().create_future()
        self._reserved.append((command, reply))
        self._dispatch_next()
        return await reply  # cancelled, it is passed over

    def drop(self, numbers: Sequence[int]) -> None:
        """Let the device forget images and teacher batches."""
        self.supervisor.send(Drop(tuple(numbers)))

    def forecast(self, job: Job) -> Forecast:
        """Forecast the seconds until `job` would start and be done, were it submitted now."""
        return self.scheduler.forecast(job, self._in_flight.left)

    def submit(self, job: Job, submission: Submission) -> None:
        """Queue a job, all of a submission or a part of it.

        Raises:
            QueueFullError, DeadlineUnreachableError, DrainingError: refused, with the time to come again.
        """
        if self._stopping:
            raise errors.DrainingError("the server is shutting down", retry_after=1)
        refusal = self.scheduler.admit(job, time.perf_counter(), self._in_flight.left)
        if refusal is not None:
            waiting = f"{self.scheduler.depth} images wait already"
            if refusal.reason == "full":
                raise errors.QueueFullError.after(
                    refusal.start, f"{waiting}, of at most {self.scheduler.queue_size}"
                )
            raise errors.DeadlineUnreachableError.after(
                refusal.start,
                f"{waiting}: this request would start in {1e3 * refusal.start:.0f} ms and be done in "
                f"{1e3 * refusal.finish:.0f} ms, after its deadline_ms",
            )
        self._pending[job] = submission
        if self._in_flight and self._on_gpu:  # which computes while the noise is made
            self.supervisor.send(Foresee(job.model, job.keys))
        self._dispatch_next()
        self._set_deadline_timer()

    def cancel(self, job: Job) -> None:
        """Forget a job whose client has left; harmless for one that is over."""
        if self._settle(job) is not None:
            self.scheduler.end(job)

    def end_all(self) -> None:
        """Refuse new jobs from now on, and end those that are here."""
        self._stopping = True
        for job in self.scheduler.jobs:
            self._fail(job, errors.DrainingError("the server shut down before this was done", retry_after=1))

    async def stop(self) -> None:
        """End all jobs and the process, with the pass that it runs."""
        self.end_all()
        for timer in (self._deadline_timer, self._next_timer):
            if timer is not None:
                timer.cancel()
        await self.supervisor.stop()

    def _dispatch_next(self) -> None:
        """Give the device its next pass, if it wants one, or look again when it will."""
        delay = self._in_flight.until_next if self.up else None
        if self._next_timer is not None:
            self._next_timer.cancel()
            self._next_timer = None
        if delay is None or (self._in_flight and self._reserved):
            return
        if delay > 0:
            if not self._stopping:
                self._next_timer = asyncio.get_running_loop().call_later(delay, self._dispatch_next)
            return
        while self._reserved:
            command, reply = self._reserved.popleft()
            if not reply.done():
                self._dispatch(command, 0.0, reply)
                return
        self._expire()
        if self.scheduler.dropped:
            dropped, self.scheduler.dropped = self.scheduler.dropped, []
            self.drop(dropped)
            if not self.supervisor.up:  # sending found the process gone
                return
        batch = self.scheduler.next_batch()
        if batch is not None:
            self._dispatch(command_of(batch), self.scheduler.expected(batch), batch)
            self._dispatch_next()

    def _dispatch(self, command: Forward, expected: float, source: Source) -> None:
        self._in_flight.add(expected, source)
        # On a GPU a pass of the warm-up may have to load, choose and record kernels: as long as it takes.
        warming_up = isinstance(source, asyncio.Future)
        self.supervisor.forward(command, watched=not (warming_up and self._on_gpu))

    def _on_answer(self, answer: Done | Failed) -> None:
        source, seconds = self._in_flight.end()
        self._busy.inc(seconds)
        if isinstance(answer, Done):
            self.metrics.device_memory(self.name, answer.memory)
        if isinstance(source, asyncio.Future):
            self.scheduler.pace.interrupted()
            if not source.done():
                source.set_result(answer)
        elif isinstance(answer, Done):
            self._finish(source, answer)
        else:
            images = len(source.samples)
            log.warning("a pass of %d images failed (%s): its halves are tried", images, answer.reason)
            guilty = self.scheduler.split(source, out_of_memory=answer.out_of_memory)
            if guilty is not None:
                kind = errors.OutOfMemoryError if answer.out_of_memory else errors.ComputeError
                self._fail(guilty, kind("the device failed on this request; the server's log says why"))
        self._dispatch_next()

    def _on_lost(self, crashed: bool) -> None:
        """Queue again all that the process had, for the next one."""
        if self._in_flight:
            source, seconds = self._in_flight.end()
            self._in_flight.clear()
            self._busy.inc(seconds)
            if isinstance(source, asyncio.Future) and not source.done():
                source.set_result(Failed(False, "the device process died", killed=not crashed))
        hopeless = self.scheduler.restart(crashed=crashed)
        if hopeless is not None and crashed:
            self._fail(hopeless, errors.ComputeError("the device process died on this request, twice"))
        elif hopeless is not None:
            self._fail(
                hopeless,
                errors.DeviceKilledError.of(
                    f"the device process was killed from outside {hopeless.kills} times while it was at this "
                    "request",
                ),
            )
        self._restarts.inc()
        self.on_change()

    def _on_restored(self, seconds: float) -> None:
        self.metrics.worker_recovery.observe(seconds)
        self.on_change()
        self._dispatch_next()

    def _finish(self, batch: Batch, answer: Done) -> None:
        by_number = {sample.number: sample for sample in batch.samples}
        pictures: list[tuple[Submission, Sample, Pixels, bool]] = []
        for number, pixels in answer.pictures.items():
            sample = by_number[number]
            submission = self._pending.get(sample.job)
            if submission is not None:
                pictures.append((submission, sample, pixels, sample.last))  # `finish` moves it on
        discarded, decoded = sum(s.job.over for s in batch.samples), len(batch.decoding)
        for number in answer.broken:
            log.error("an image of %s came out as no number", batch.work.model)
            self._fail(by_number[number].job, errors.ComputeError("the model's output is not a number"))
        now = time.perf_counter()
        complete = self.scheduler.finish(
            batch, answer.seconds, answer.decode_seconds, now, answer.text_seconds
        )
        for submission, sample, pixels, last in pictures:
            sample.job.finished = now
            submission.deliver(sample.job, sample.index, pixels, last=last)
        for job in complete:
            self.metrics.queue_wait.observe(job.queue_s)
            finished = self._settle(job)
            assert finished is not None, "a job without a submission"
            finished.complete(job)
        self._count(batch, answer, decoded, discarded)

    def _count(self, batch: Batch, answer: Done, decoded: int, discarded: int) -> None:
        model, kind, _ = batch.work
        if answer.text_seconds:
            self.metrics.text_encode.observe(answer.text_seconds)
        if kind != "decode":
            self.metrics.executed(model, kind, len(batch.samples), answer.seconds)
        if decoded:
            self.metrics.executed(model, "decode", decoded, answer.decode_seconds)
        if discarded:
            lost = (answer.seconds + answer.decode_seconds) * discarded / len(batch.samples)
            self.metrics.discarded.inc(lost)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error."""
        self.scheduler.end(job)
        submission = self._settle(job)
        if submission is not None:
            submission.fail(error)

    def _settle(self, job: Job) -> Submission | None:
        """Take out a job that is over; None if it was already."""
        self._settled.set()
        return self._pending.pop(job, None)

    def _expire(self) -> None:
        for job in self.scheduler.expired(time.perf_counter()):
            self._fail(job, errors.DeadlineError("the images could not be done within deadline_ms"))
        self._set_deadline_timer()

    def _set_deadline_timer(self) -> None:
        """Wake up at the next deadline."""
        deadline = self.scheduler.next_deadline
        if self._deadline_timer is not None and (deadline is None or deadline < self._deadline_at):
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if self._deadline_timer is None and deadline is not None:  # one that is too early does no harm
            delay = max(0.0, deadline - time.perf_counter())
            self._deadline_timer = asyncio.get_running_loop().call_later(delay, self._on_deadline)
            self._deadline_at = deadline

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        self._expire()


def command_of(batch: Batch) -> Forward:
    """Return the command that runs a batch."""
    return Forward(
        batch.work.model,
        batch.work.kind,
        tuple(s.number for s in batch.samples),
        tuple(s.at.segment for s in batch.samples),
        batch.bucket,
        new=tuple(NewImage(s.number, s.job.plan, s.job.condition, s.job.keys[s.index]) for s in batch.new),
        teacher_batch=batch.teacher_batch.number if batch.teacher_batch is not None else None,
        finishing=tuple(s.number for s in batch.finishing),
        previewing=tuple(s.number for s in batch.previewing),
    )
