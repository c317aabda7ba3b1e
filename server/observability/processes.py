"""Memory and processor time of the device processes, read from `/proc` when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_LABELS = ["device"]


class ProcessUsage(Collector):
    """Metrics of the processes that `pids` names by device; of one that is gone, or without `/proc`, none.

    Processor time starts at 0 with every process, as counters may.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.pids: Callable[[], Mapping[str, int | None]] = dict
        self._proc = proc

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return self._families()

    def collect(self) -> Iterator[Metric]:
        """The families with a sample for each process that lives."""
        memory, seconds = families = self._families()
        for device, pid in self.pids().items():
            try:
                stat = (self._proc / str(pid) / "stat").read_text(encoding="utf-8")
            except OSError:
                continue
            fields = stat.rpartition(")")[2].split()  # behind the name, which may hold anything
            user, system, resident = int(fields[11]), int(fields[12]), int(fields[21])
            memory.add_metric([device], resident * os.sysconf("SC_PAGE_SIZE"))
            seconds.add_metric([device], (user + system) / os.sysconf("SC_CLK_TCK"))
        yield from families

    def _families(self) -> tuple[GaugeMetricFamily, CounterMetricFamily]:
        return (
            GaugeMetricFamily(
                "dd_worker_resident_memory_bytes", "Resident memory of a device process.", labels=_LABELS
            ),
            CounterMetricFamily(
                "dd_worker_cpu_seconds_total", "Processor time of a device process.", labels=_LABELS
            ),
        )
