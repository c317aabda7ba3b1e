"""The loads and unloads of models that go on while the server serves.

    load(source) ─▶ find, in a process of its own ─▶ pool.load ─▶ the catalog
         └── ends with an error after `load_timeout`, when it is cancelled, or when the server drains

Each load goes on by itself; two of one source, or of one name, do not.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.devices.finder import Find, find_apart
from server.devices.warmup import LoadTimes
from server.errors import ApiError, ConflictError, DrainingError, LoadTimeoutError, shortened
from server.models.catalog import Catalog, ServedModel, find
from server.observability.metrics import Metrics
from server.settings import Settings


class _Pool(Protocol):
    async def load(self, model: ServedModel) -> LoadTimes: ...

    async def unload(self, name: str) -> None: ...


@dataclass(eq=False)
class _Load:
    source: str
    since: float = field(default_factory=time.monotonic)
    name: str | None = None  # known once the manifest is read
    task: asyncio.Task[ServedModel] | None = None
    ending: ApiError | None = None  # why it was cancelled

    def end(self, reason: ApiError) -> None:
        if self.task is not None and self.ending is None:
            self.ending = reason
            self.task.cancel()


@dataclass(eq=False)
class Loads:
    """The loads under way, and the names of models that are being unloaded."""

    settings: Settings
    catalog: Catalog
    metrics: Metrics
    find: Find = find  # run in another process

    def __post_init__(self) -> None:
        self._loads: list[_Load] = []
        self._unloading: set[str] = set()

    def describe(self) -> dict[str, Any]:
        """The reply to `GET /admin/models`."""
        now = time.monotonic()
        return {
            "models": [{"name": m.name, "folder": str(m.folder)} for m in self.catalog.models.values()],
            "loads": [
                {"source": load.source, "name": load.name, "seconds": round(now - load.since, 3)}
                for load in self._loads
            ],
            "unloads": sorted(self._unloading),
        }

    async def load(self, pool: _Pool, source: str) -> ServedModel:
        """Find a model, fetched where it must be, load it on every device, and add it to the catalog.

        Raises:
            DDError: it cannot be had, or cannot be served.
            ConflictError: its name or its source is taken, or `cancel` was called.
            LoadTimeoutError: it took more than `load_timeout`.
            DrainingError: the server shuts down.
        """
        if any(other.source == source for other in self._loads):
            raise ConflictError(f"{shortened(source)} is being loaded already", param="model")
        load = _Load(source)
        load.task = asyncio.create_task(self._run(load, pool))
        self._loads.append(load)
        # Also of a task that was cancelled before it began.
        load.task.add_done_callback(lambda _: self._loads.remove(load))
        try:
            return await load.task
        except asyncio.CancelledError:
            if load.ending is None:
                raise
            raise load.ending from None

    async def _run(self, load: _Load, pool: _Pool) -> ServedModel:
        limit = asyncio.timeout(self.settings.load_timeout)
        try:
            async with limit:
                model = await find_apart(self.find, load.source, self.settings)
                self._check_name(model.name, load.source)
                load.name = model.name
                times = await pool.load(model)
        except TimeoutError:
            if not limit.expired():
                raise
            seconds = self.settings.load_timeout
            message = f"{shortened(load.source)} was not loaded within {seconds:g} s (load_timeout)"
            raise LoadTimeoutError(message, param="model") from None
        self.metrics.bind(model.name, model.presets)
        self.metrics.loaded(model.name, model.manifest.digest, sum(times))
        self.catalog.models[model.name] = model
        return model

    def _check_name(self, name: str, source: str) -> None:
        self.catalog.check_name(name, source)
        if name in self._unloading:
            raise ConflictError(f"the model {name} is being unloaded", param="model")
        for other in self._loads:
            if other.name == name:
                message = f"a model {name} is being loaded already, from {shortened(other.source)}"
                raise ConflictError(message, param="model")

    async def cancel(self, name: str) -> bool:
        """Cancel the loads of a name or source, and wait for their end; return False where there is none."""
        found = [load for load in self._loads if name in (load.name, load.source)]
        for load in found:
            load.end(ConflictError(f"the load of {shortened(load.source)} was cancelled", param="model"))
        tasks = [load.task for load in found if load.task is not None]
        if tasks:
            await asyncio.wait(tasks)
        return bool(found)

    async def unload(self, pool: _Pool, name: str) -> bool:
        """Take a model out of the catalog and free its memory once its requests are over; return False where
        there is none.
        """
        model = self.catalog.models.pop(name, None)
        if model is None:
            return False
        self.metrics.unloaded(name, model.manifest.digest)
        self._unloading.add(name)
        try:
            await pool.unload(name)
        finally:
            self._unloading.remove(name)
        return True

    def end_all(self) -> None:
        """Cancel all loads: the server shuts down."""
        for load in self._loads:
            load.end(DrainingError("the server is shutting down", retry_after=1))
