"""All device workers: one process a device, each with every model.

submit(job) ─▶ the worker with the least work ahead ─▶ its scheduler, its device
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from dd_core.runtime import pick_device
from server.backlog import Forecast
from server.catalog import ServedModel
from server.costs import CostTable, buckets_up_to
from server.device import DeviceOptions, Prepare
from server.images import Pixels
from server.jobs import Job
from server.metrics import Metrics
from server.scheduler import Scheduler
from server.settings import Settings
from server.worker import DeviceWorker, Watch


def devices_of(setting: str) -> list[str]:
    """`auto`: every CUDA device, else the CPU; otherwise the devices named, by commas.

    Raises:
        InvalidRequestError: one of them is not on this machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        return [f"cuda:{number}" for number in range(count)] or ["cpu"]
    return [str(pick_device(name.strip())) for name in setting.split(",")]


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
        settings: devices, batch sizes, queue, policy.
        metrics: where everything is counted.
        on_change: called when a worker dies or is back.
        on_failure: called when one cannot be brought back.
        prepare: applied by the device processes to every bundle they load.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        on_change: Callable[[], None],
        on_failure: Callable[[Exception], None],
        prepare: Prepare | None = None,
    ) -> None:
        names = devices_of(settings.device)
        exact = settings.determinism == "exact"
        self._warm = settings.warmup
        self._workers = []
        self._held: Counter[str] = Counter()
        self._released = asyncio.Event()
        self.kind = _kind_of(names, settings.max_batch)
        for name in names:
            # On a GPU a kernel is chosen by the shape of a batch: exact bytes need one shape for all.
            fixed = exact and name.startswith("cuda")
            costs = CostTable((settings.max_batch,) if fixed else buckets_up_to(settings.max_batch))
            worker = DeviceWorker(
                DeviceOptions(
                    name, settings.threads, exact, settings.log_level, settings.log_format, prepare
                ),
                Scheduler(costs, settings.queue_size, settings.cohorts, settings.policy),
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
        loads = (
            worker.load(model.name, model.folder, plans, model.any_condition) for worker in self._workers
        )
        await asyncio.gather(*loads)

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
        return self._least_loaded().forecast(job)

    def submit(self, job: Job, watch: Watch | None = None) -> asyncio.Future[list[Pixels]]:
        """Queue a job where the least work is ahead of it; see `DeviceWorker.submit`.

        Raises:
            QueueFullError, DeadlineUnreachableError, DrainingError: refused.
        """
        return self._least_loaded().submit(job, watch)

    def cancel(self, job: Job) -> None:
        """Forget a job whose client has left."""
        for worker in self._workers:
            worker.cancel(job)

    async def stop(self) -> None:
        """Refuse what waits and end the processes."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def _least_loaded(self) -> DeviceWorker:
        workers: Sequence[DeviceWorker] = [w for w in self._workers if w.up] or self._workers
        return workers[0] if len(workers) == 1 else min(workers, key=lambda worker: worker.backlog)
