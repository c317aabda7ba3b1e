"""The one thread that owns the device.

    event loop                         this thread
    submit(job) ── Scheduler.offer ──▶ take() → sample_images → finish()
    await future ◀── call_soon_threadsafe ── pixels of complete jobs

Encoding and HTTP never wait for the device, nor the device for them. A batch that fails is tried
again job by job, so that only the requests that fail by themselves get an error.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from dd_core.bundle import Bundle
from dd_core.sampling import sample_images
from server.errors import ComputeError, DrainingError, QueueFullError
from server.images import Pixels
from server.metrics import Metrics
from server.scheduler import Batch, BatchKey, Job, Scheduler

log = logging.getLogger("dd_server.worker")
T = TypeVar("T")


@dataclass(eq=False)
class _Ticket:
    """Where a job's pixels go."""

    future: asyncio.Future[list[Pixels]]
    pixels: dict[int, Pixels] = field(default_factory=dict)


class DeviceWorker:
    """Computes what the scheduler hands out.

    Args:
        bundles: the loaded models by name, all on the device.
        scheduler: its queue; nobody else may touch it.
        metrics: where batches and waiting are counted.
    """

    def __init__(self, bundles: Mapping[str, Bundle], scheduler: Scheduler, metrics: Metrics) -> None:
        self._bundles = bundles
        self._scheduler = scheduler
        self._metrics = metrics
        self._wake = threading.Condition()
        self._tickets: dict[Job, _Ticket] = {}
        self._stopping = False
        self._running: tuple[float, float] | None = None  # started, expected seconds
        self._thread = threading.Thread(target=self._main, name="device", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._warmed: asyncio.Future[None]
        self._warm_up_first = True

    def start(self, warm_up: bool = True) -> asyncio.Future[None]:
        """Start the thread; the future is done once it has run every offered plan and takes work."""
        self._loop = asyncio.get_running_loop()
        self._warmed = self._loop.create_future()
        self._warm_up_first = warm_up
        self._thread.start()
        return self._warmed

    def submit(self, job: Job) -> asyncio.Future[list[Pixels]]:
        """Queue a job; the future gives its images `[H, W, 3]` uint8 in order of their index.

        Raises:
            QueueFullError: no room; says when to come again.
        """
        with self._wake:
            if self._stopping:
                raise DrainingError("the server is shutting down", retry_after=1)
            if not self._scheduler.offer(job):
                wait = self._scheduler.retry_after(job.count, self._busy_seconds())
                raise QueueFullError(
                    f"{self._scheduler.depth} images wait already and the limit is "
                    f"{self._scheduler.queue_size}; try again in {wait} s",
                    retry_after=wait,
                )
            future: asyncio.Future[list[Pixels]] = self._loop.create_future()
            self._tickets[job] = _Ticket(future)
            self._metrics.queue_depth.set(self._scheduler.depth)
            self._wake.notify()
        return future

    def cancel(self, job: Job) -> None:
        """Forget a job whose client has left; harmless for one that is complete."""
        with self._wake:
            if self._tickets.pop(job, None) is not None:
                self._scheduler.cancel(job)
                self._metrics.queue_depth.set(self._scheduler.depth)

    def stop(self, timeout: float) -> bool:
        """Refuse what waits, let the running batch end; False if it has not after `timeout` seconds."""
        with self._wake:
            self._stopping = True
            for job in self._scheduler.drain():
                self._settle(job, DrainingError("the server shut down before it came to this", retry_after=1))
            self._metrics.queue_depth.set(0)
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _busy_seconds(self) -> float:
        if self._running is None:
            return 0.0
        started, expected = self._running
        return started + expected - time.perf_counter()

    # All below runs on the device thread.

    def _main(self) -> None:
        try:
            if self._warm_up_first:
                self._warm_up()
        except Exception as error:  # noqa: BLE001 - the event loop gets it, whatever it is
            self._tell(partial(_resolve, self._warmed, None, error))
            return
        self._tell(partial(_resolve, self._warmed, None, None))
        while (batch := self._next()) is not None:
            self._run(batch)
            del batch  # or the last batch's jobs would live until the next request

    def _next(self) -> Batch | None:
        with self._wake:
            while not self._stopping:
                batch = self._scheduler.take()
                if batch is not None:
                    self._metrics.queue_depth.set(self._scheduler.depth)
                    expected = self._scheduler.meter.estimate(batch.key, len(batch.items))
                    self._running = (time.perf_counter(), expected)
                    return batch
                self._running = None
                self._wake.wait()
        return None

    def _run(self, batch: Batch) -> None:
        started = time.perf_counter()
        pixels: list[Pixels] | None = None
        try:
            keys = [(job.seed, index) for job, index in batch.items]
            pixels = self._compute(batch.key, [job.label for job, _ in batch.items], keys)
        except Exception:
            log.exception("a batch of %d images of %s failed", len(batch.items), batch.key[1].name)
        if pixels is None:  # outside of the handler, whose traceback holds on to the batch's tensors
            self._recover(batch)
            return
        now = time.perf_counter()
        with self._wake:
            complete = self._scheduler.finish(batch, now - started, now)
            for (job, index), image in zip(batch.items, pixels, strict=True):
                if job in self._tickets:
                    self._tickets[job].pixels[index] = image
            for job in complete:
                self._metrics.queue_wait.observe(job.queue_s)
                self._settle(job)
            discarded = sum(job.canceled for job, _ in batch.items)
        self._metrics.executed(batch.key[0], batch.key[1], len(batch.items), now - started)
        if discarded:
            self._metrics.discarded.inc((now - started) * discarded / len(batch.items))

    def _recover(self, batch: Batch) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        jobs = batch.jobs
        if len(jobs) > 1:
            for job in jobs:
                self._run(Batch(batch.key, [item for item in batch.items if item[0] is job]))
            return
        with self._wake:
            self._scheduler.cancel(jobs[0])
            self._settle(
                jobs[0], ComputeError("the device failed on this request; the server's log says why")
            )

    def _compute(self, key: BatchKey, labels: list[int], keys: list[tuple[int, int]]) -> list[Pixels]:
        name, plan = key
        images = sample_images(self._bundles[name].sampler, plan, labels, keys)
        return list(images.numpy())

    def _warm_up(self) -> None:
        for name, bundle in self._bundles.items():
            plans = [preset.plan for preset in bundle.presets if preset.offered]
            for plan in sorted(plans, key=lambda plan: plan.cost):
                if self._stopping:
                    return
                started = time.perf_counter()
                self._compute((name, plan), [0], [(0, 0)])
                seconds = time.perf_counter() - started
                self._scheduler.meter.observe((name, plan), 1, seconds)
                log.debug("warm-up: %s of %s took %.1f ms", plan.name, name, 1e3 * seconds)

    def _settle(self, job: Job, error: Exception | None = None) -> None:
        """Answer a job (with the lock held)."""
        ticket = self._tickets.pop(job, None)
        if ticket is not None:
            images = [ticket.pixels[index] for index in sorted(ticket.pixels)]
            self._tell(partial(_resolve, ticket.future, images, error))

    def _tell(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: the process ends and nobody waits any more
            log.debug("an answer came after the event loop had closed")


def _resolve(future: asyncio.Future[T], result: T, error: Exception | None) -> None:
    if future.done():  # whoever waited has left in the meantime
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
