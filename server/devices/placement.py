"""Choose the device processes of a server and the threads of each, once, from the machine and the models.

    setting, models, cores ─▶ [WorkerSpec, …]     one process each, with all the models

A GPU gets a process. On a CPU the operations of a small model gain nothing from a second thread, and a
thread that HTTP interrupts keeps its partners waiting; so small models get processes that wait for nobody,
as many as there are cores. The operations of a large model do gain, and its weights would be held twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dd_core.runtime import pick_device

# Of all weights together. A process more takes as much again, and some hundred MiB of its own.
SMALL_BYTES = 256 * 2**20
MAX_PROCESSES = 4
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class WorkerSpec(NamedTuple):
    """A device process for `device` with `threads` threads of PyTorch (0 = its choice)."""

    device: str
    threads: int


def devices_of(setting: str) -> list[str]:
    """Resolve the setting `device`: `auto` is every CUDA device, else the CPU; otherwise names, by commas.

    Raises:
        InvalidRequestError: one of them is not on this machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        return [f"cuda:{number}" for number in range(count)] or ["cpu"]
    return [str(pick_device(name.strip())) for name in setting.split(",")]


def device_names(devices: Sequence[str]) -> list[str]:
    """Name each device process: `cuda:0`, and on a CPU, or as another one of a GPU, by its number too
    (`cpu:1`, `cuda:0:1`).
    """
    numbers = [devices[:place].count(device) for place, device in enumerate(devices)]
    return [
        f"{device}:{number}" if device == "cpu" or number else device
        for device, number in zip(devices, numbers, strict=True)
    ]


def worker_specs(setting: str, threads: int, weights: int, cores: int) -> list[WorkerSpec]:
    """Choose the processes to start.

    Args:
        setting: as for `devices_of`.
        threads: of each process on a CPU; 0 = the cores are shared out.
        weights: bytes of all models.
        cores: that a CPU process may use.

    Raises:
        InvalidRequestError: a device is not on this machine.
    """
    names = devices_of(setting)
    if setting == "auto" and names == ["cpu"] and weights <= SMALL_BYTES:
        names *= max(1, min(MAX_PROCESSES, cores // max(1, threads)))
    share = threads or max(1, cores // max(1, names.count("cpu")))
    return [WorkerSpec(name, share if name == "cpu" else threads) for name in names]


def usable_cores(quota: Path = _QUOTA) -> int:
    """Count the cores to compute on: PyTorch's count, which knows `OMP_NUM_THREADS` and affinity, or what the
    container may use if that is less (PyTorch counts the node's).
    """
    cores = torch.get_num_threads()
    try:
        most, period = quota.read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(most) / int(period))))
    except (OSError, ValueError):  # no control groups of this version, or "max"
        return cores
