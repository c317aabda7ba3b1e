"""All device workers, each a process with every model.

submit(job) ─ deal ─▶ the worker with the least work ahead, or several ─▶ its scheduler, its device
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from server.devices import dealing
from server.devices.messages import DeviceOptions, Prepare
from server.devices.placement import WorkerSpec
from server.devices.warmup import Step, steps_of
from server.devices.worker import DeviceWorker, Watch
from server.generation.encoder import Pixels
from server.models.catalog import ServedModel
from server.observability.metrics import Metrics
from server.scheduling.backlog import Forecast
from server.scheduling.costs import CostTable, buckets_up_to
from server.scheduling.jobs import Job
from server.scheduling.scheduler import Scheduler
from server.settings import Settings


def _kind_of(devices: Sequence[str], max_batch: int) -> str:
    """All that the last bits of a picture may depend on, besides its model: the build and the devices. On
    a GPU kernels are chosen by the shape of a batch.
    """
    kinds = {
        f"{torch.cuda.get_device_name(name)} {max_batch}" if name.startswith("cuda") else platform.machine()
        for name in devices
    }
    return " ".join([torch.__version__, *sorted(kinds)])


class Engine:
    """What makes images.

    `kind` tells apart machines whose pictures may differ in their last bits.

    Args:
        settings: batch sizes, queue, policy.
        places: the processes to start.
        metrics: where everything is counted.
        on_change: called when a worker dies or is back.
        on_failure: called when one cannot be brought back.
        prepare: applied by the device processes to every bundle they load.
    """

    def __init__(
        self,
        settings: Settings,
        places: Sequence[WorkerSpec],
        metrics: Metrics,
        *,
        on_change: Callable[[], None],
        on_failure: Callable[[Exception], None],
        prepare: Prepare | None = None,
    ) -> None:
        exact = settings.determinism == "exact"
        self._warm = settings.warmup
        self._devices = [place.device for place in places]
        self._workers: list[DeviceWorker] = []
        self._held: Counter[str] = Counter()
        self._released = asyncio.Event()
        self.kind = _kind_of(self._devices, settings.max_batch)
        on_cpu = CostTable(buckets_up_to(settings.max_batch))  # of all its processes, which are alike
        # Wherever it goes, the largest request finds room.
        room = max(settings.max_images, -(-settings.queue_size // len(places)))
        for name, threads in places:
            # On a GPU a kernel is chosen by the shape of a batch: exact bytes need one shape for all.
            shapes = (settings.max_batch,) if exact else buckets_up_to(settings.max_batch)
            costs = on_cpu if name == "cpu" else CostTable(shapes)
            worker = DeviceWorker(
                DeviceOptions(name, threads, exact, settings.log_level, settings.log_format, prepare),
                Scheduler(costs, room, settings.cohorts, settings.policy),
                metrics,
                hang_timeout=settings.hang_timeout,
                on_change=on_change,
                on_failure=on_failure,
            )
            self._workers.append(worker)
        metrics.queue_depth.set_function(lambda: self.depth)

    @property
    def up(self) -> bool:
        """Whether every device process lives."""
        return all(worker.up for worker in self._workers)

    @property
    def depth(self) -> int:
        """Images that wait for a device."""
        return sum(worker.depth for worker in self._workers)

    @property
    def pids(self) -> list[int | None]:
        """The device processes."""
        return [worker.pid for worker in self._workers]

    async def start(self) -> None:
        """Start the processes."""
        await asyncio.gather(*(worker.start() for worker in self._workers))

    async def load(self, model: ServedModel) -> None:
        """Load a model everywhere and warm it up; it may be asked for then.

        Raises:
            DDError: the bundle is damaged, or a pass over a single image fails.
        """
        plans = [preset.plan for preset in model.presets if preset.offered] if self._warm else []
        steps = steps_of(model.name, plans)
        loads = (
            worker.load(model.name, model.folder, share, model.any_condition)
            for worker, share in zip(self._workers, self._shares(steps), strict=True)
        )
        failures = [error for error in await asyncio.gather(*loads, return_exceptions=True) if error]
        if failures:  # nowhere or everywhere
            await asyncio.gather(*(worker.unload(model.name) for worker in self._workers))
            raise failures[0]

    def _shares(self, steps: Sequence[Step]) -> list[Sequence[Step]]:
        """What each worker warms up: on a GPU all, since much is made for a device; on a CPU, whose processes
        have one table of costs, a part, but never nothing.
        """
        shares: list[Sequence[Step]] = []
        peers = self._devices.count("cpu")
        for number, device in enumerate(self._devices):
            place = self._devices[:number].count("cpu")
            shares.append(steps[place::peers] or steps[:1] if device == "cpu" else steps)
        return shares

    def hold(self, model: str) -> None:
        """More of a request is to come: the model stays until it is released as often as held."""
        self._held[model] += 1

    def release(self, model: str) -> None:
        """Nothing more is to come of a request that held the model."""
        self._held[model] -= 1
        self._released.set()

    async def unload(self, name: str) -> None:
        """Let the model's requests end, then forget it; nobody may ask for it any more."""
        while self._held[name]:
            self._released.clear()
            await self._released.wait()
        await asyncio.gather(*(worker.unload(name) for worker in self._workers))

    def forecast(self, job: Job) -> Forecast:
        """Seconds until `job` would start and be done, were it submitted now."""
        return dealing.forecast(dealing.dispatch(job, self._able))

    def submit(self, job: Job, watch: Watch | None = None) -> asyncio.Future[list[Pixels]]:
        """Queue a job where it is done soonest; see `DeviceWorker.submit`.

        Raises:
            QueueFullError, DeadlineUnreachableError, DrainingError: refused.
        """
        return dealing.submit(job, dealing.dispatch(job, self._able), watch)

    def cancel(self, job: Job) -> None:
        """Forget a job whose client has left."""
        for worker in self._workers:
            worker.cancel(job)

    async def stop(self) -> None:
        """Refuse what waits and end the processes."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    @property
    def _able(self) -> list[DeviceWorker]:
        return [worker for worker in self._workers if worker.up] or self._workers
