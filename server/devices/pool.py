"""The device workers, each a process with every model.

    submit(job) ─ dispatch ─▶ Parts, each the job of one worker ─▶ its scheduler, its device ─▶ Submission

The images of a job are split evenly over several workers if the last of them is done sooner that way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import torch

from server.devices.kept_costs import CostFile, device_facts
from server.devices.messages import DeviceOptions, Prepare
from server.devices.placement import WorkerSpec, device_names
from server.devices.submission import Submission
from server.devices.warmup import LoadTimes, WarmupPass, warmup_passes
from server.devices.worker import DeviceWorker
from server.models.catalog import ServedModel
from server.observability.metrics import Metrics, package_version
from server.scheduling.backlog import Forecast
from server.scheduling.costs import CostTable, buckets_up_to
from server.scheduling.jobs import Job
from server.scheduling.scheduler import Scheduler
from server.settings import Settings


class Part(NamedTuple):
    """Images `first`, `first` + 1, … of a job, as a job of `worker`."""

    worker: DeviceWorker
    job: Job
    first: int


@dataclass(eq=False)
class DevicePool:
    """The device workers of a server."""

    settings: Settings
    specs: Sequence[WorkerSpec]  # the processes to start
    metrics: Metrics
    on_change: Callable[[], None]  # a worker died, or is back
    on_failure: Callable[[Exception], None]  # one cannot be brought back
    prepare: Prepare | None = None  # applied by the device processes to every bundle they load

    def __post_init__(self) -> None:
        settings = self.settings
        exact = settings.determinism == "exact"
        self._devices = [spec.device for spec in self.specs]
        self._workers: list[DeviceWorker] = []
        self._held: Counter[str] = Counter()
        self._released = asyncio.Event()
        on_cpu = CostTable(buckets_up_to(settings.max_batch))  # of all its processes, which are alike
        # Wherever it goes, the largest request finds room.
        room = max(settings.max_images, -(-settings.queue_size // len(self.specs)))
        names = device_names(self._devices)
        for name, (device, threads) in zip(names, self.specs, strict=True):
            costs = on_cpu if device == "cpu" else CostTable(buckets_up_to(settings.max_batch))
            worker = DeviceWorker(
                name,
                DeviceOptions(
                    device,
                    threads,
                    exact,
                    settings.arithmetic,
                    settings.log_level,
                    settings.log_format,
                    self.prepare,
                ),
                Scheduler(costs, room, settings.cohorts),
                self.metrics,
                settings.hang_timeout,
                self.on_change,
                self.on_failure,
            )
            self._workers.append(worker)
            self.metrics.backlog.labels(name).set_function(partial(attrgetter("ahead"), worker))
        self.metrics.queue_depth.set_function(lambda: self.depth)
        self.metrics.queue_capacity.set(room * len(names))
        self.metrics.devices.labels("up").set_function(lambda: sum(w.up for w in self._workers))
        self.metrics.devices.labels("replacing").set_function(lambda: sum(not w.up for w in self._workers))
        self.metrics.processes.pids = lambda: dict(zip(names, self.pids, strict=True))

    @property
    def kind(self) -> str:
        """Name of what the last bits of a picture depend on besides its model: the build, the devices, and an
        arithmetic that was asked for (`auto` follows from the device where bytes are promised).
        """
        hardware = {worker.supervisor.hardware for worker in self._workers}
        named = [self.settings.arithmetic] * (self.settings.arithmetic != "auto")
        return " ".join([torch.__version__, *sorted(hardware), *named])

    @property
    def up(self) -> bool:
        """True while a device process lives: requests go there until the others are back."""
        return any(worker.up for worker in self._workers)

    @property
    def depth(self) -> int:
        """Images that wait for a device."""
        return sum(worker.depth for worker in self._workers)

    @property
    def pids(self) -> list[int | None]:
        """The device processes."""
        return [worker.supervisor.pid for worker in self._workers]

    async def start(self) -> None:
        """Start the processes."""
        await asyncio.gather(*(worker.supervisor.start() for worker in self._workers))

    async def load(self, model: ServedModel) -> LoadTimes:
        """Load a model everywhere and warm it up; it may be asked for then. Cancelled, it leaves nothing.

        Returns:
            The times of the slowest device.

        Raises:
            DDError: the bundle is damaged, or a pass over a single image fails.
        """
        try:
            loads = await _of_each(worker.load(model.name, model.folder) for worker in self._workers)
            return LoadTimes(max(loads), max(await self._warm_up(model)))
        except BaseException:  # nowhere or everywhere
            for worker in self._workers:
                worker.forget(model.name)
            raise

    async def _warm_up(self, model: ServedModel) -> list[float]:
        """Warm up a model that is loaded, keep its costs for the next start, and return the seconds of each
        device. Devices of a kind have costs of their own, but one file of them.
        """
        plans = [preset.plan for preset in model.presets if preset.offered] if self.settings.warmup else []
        shares = self._shares(warmup_passes(model.name, plans))
        condition = "a picture" if model.manifest.reads_text else 0  # any that it takes
        kinds = [worker.supervisor.hardware for worker in self._workers]
        files = self._cost_files(model, kinds) if plans else {}
        before = {kind: await asyncio.to_thread(file.read, model.name) for kind, file in files.items()}
        kept = {kind: dict(before.get(kind, {})) for kind in kinds}
        work = zip(self._workers, shares, kinds, strict=True)
        seconds = await _of_each(worker.warm_up(share, condition, kept[kind]) for worker, share, kind in work)
        for kind, file in files.items():
            if kept[kind] != before[kind]:
                await asyncio.to_thread(file.write, kept[kind])
        return seconds

    def _cost_files(self, model: ServedModel, kinds: Sequence[str]) -> dict[str, CostFile]:
        """Return the files of a model's costs by the kind of device; none of one that `prepare` changes."""
        if self.prepare is not None:
            return {}
        settings, files = self.settings, {}
        for worker, kind in zip(self._workers, kinds, strict=True):
            facts = {
                **device_facts(kind, worker.options.threads, len(self.specs)),
                "server": package_version(),
                "arithmetic": settings.arithmetic,
                "determinism": settings.determinism,
                "buckets": worker.scheduler.costs.buckets,
                "weights": model.manifest.digest,
            }
            files[kind] = CostFile(settings.costs_folder, facts)
        return files

    def _shares(self, passes: Sequence[WarmupPass]) -> list[Sequence[WarmupPass]]:
        """Share out the warm-up: on a GPU all to each, since much is made for a device; on a CPU, whose
        processes have one table of costs, a part to each, but never nothing.
        """
        shares: list[Sequence[WarmupPass]] = []
        peers = self._devices.count("cpu")
        for number, device in enumerate(self._devices):
            peer = self._devices[:number].count("cpu")
            shares.append(passes[peer::peers] or passes[:1] if device == "cpu" else passes)
        return shares

    def hold(self, model: str) -> None:
        """Keep a model, of which a request has more to come, until it is released as often as held."""
        self._held[model] += 1

    def release(self, model: str) -> None:
        """Note that nothing more is to come of a request that held the model."""
        self._held[model] -= 1
        self._released.set()

    async def unload(self, name: str) -> None:
        """Let the model's requests end, then forget it; nobody may ask for it any more."""
        while self._held[name]:
            self._released.clear()
            await self._released.wait()
        await asyncio.gather(*(worker.unload(name) for worker in self._workers))

    def forecast(self, job: Job) -> Forecast:
        """Forecast the seconds until `job` would start and be done, were it submitted now."""
        return combined_forecast(dispatch(job, self._available))

    def submit(self, job: Job) -> Submission:
        """Queue a job where it is done soonest.

        Raises:
            QueueFullError, DeadlineUnreachableError, DrainingError: refused, with the time to come again.
        """
        return submit_parts(job, dispatch(job, self._available))

    def end_all(self) -> None:
        """Refuse new jobs from now on, and end those that are here."""
        for worker in self._workers:
            worker.end_all()

    async def stop(self) -> None:
        """Refuse all that waits and end the processes."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    @property
    def _available(self) -> list[DeviceWorker]:
        return [worker for worker in self._workers if worker.up] or self._workers


async def _of_each(work: Iterable[Awaitable[float]]) -> list[float]:
    """Wait for all, then raise the first error if there is one."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for failure in found:
        if isinstance(failure, BaseException):
            raise failure
    return [seconds for seconds in found if not isinstance(seconds, BaseException)]


def dispatch(job: Job, workers: Sequence[DeviceWorker]) -> list[Part]:
    """Assign a job to the worker with the least work ahead, or even parts of it to some, if that is sooner.

    Those with no room in their queue are passed over, as long as another has some: many cheap images are less
    work than a few dear ones.

    Args:
        workers: at least one.
    """
    roomy = [worker for worker in workers if worker.room >= job.count] or workers
    ordered = sorted(roomy, key=attrgetter("backlog")) if len(roomy) > 1 else roomy
    best = [Part(ordered[0], job, 0)]
    for count in range(2, min(job.count, len(ordered)) + 1):
        parts = split_evenly(job, ordered[:count])
        if combined_forecast(parts).finish >= combined_forecast(best).finish:
            break
        best = parts
    return best


def split_evenly(job: Job, workers: Sequence[DeviceWorker]) -> list[Part]:
    """Split the images of a job over all `workers`, the first of which get one more if need be."""
    each, more = divmod(job.count, len(workers))
    parts, first = [], 0
    for number, worker in enumerate(workers):
        stop = first + each + (number < more)
        parts.append(Part(worker, replace(job, keys=job.keys[first:stop]), first))
        first = stop
    return parts


def combined_forecast(parts: Sequence[Part]) -> Forecast:
    """Forecast the start of the first part and the end of the last."""
    found = [part.worker.forecast(part.job) for part in parts]
    return Forecast(
        min(one.start for one in found), max(one.finish for one in found), max(one.alone for one in found)
    )


def submit_parts(job: Job, parts: Sequence[Part]) -> Submission:
    """Queue all parts of a job or none.

    Raises:
        QueueFullError, DeadlineUnreachableError, DrainingError: one of them is refused.
    """

    def abort() -> None:
        for part in parts:
            part.worker.cancel(part.job)

    submission = Submission(job, {part.job: part.first for part in parts}, abort)
    try:
        for part in parts:
            part.worker.submit(part.job, submission)
    except Exception:
        submission.cancel()
        raise
    if submission.over:  # one failed before the next was queued
        abort()
    return submission
