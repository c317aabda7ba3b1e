"""Which device processes a server starts, from what there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dd_core.errors import InvalidRequestError
from server.devices.placement import SMALL_BYTES, WorkerSpec, usable_cores, worker_specs

SMALL, LARGE = SMALL_BYTES, SMALL_BYTES + 1


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("setting", "threads", "weights", "cores", "expected"),
    [
        ("auto", 0, SMALL, 1, [1]),
        ("auto", 0, SMALL, 2, [1, 1]),
        ("auto", 0, SMALL, 3, [1, 1, 1]),
        ("auto", 0, SMALL, 16, [4, 4, 4, 4]),
        ("auto", 0, LARGE, 16, [16]),
        ("auto", 2, SMALL, 2, [2]),
        ("auto", 2, SMALL, 5, [2, 2]),
        ("auto", 8, SMALL, 2, [8]),
        ("auto", 3, LARGE, 16, [3]),
        ("cpu", 0, SMALL, 16, [16]),
        ("cpu", 3, SMALL, 16, [3]),
        ("cpu,cpu", 0, LARGE, 16, [8, 8]),
        ("cpu, cpu,cpu", 0, SMALL, 2, [1, 1, 1]),
        ("cpu,cpu", 3, SMALL, 4, [3, 3]),
    ],
)
def test_a_cpu_gets_processes_by_the_size_of_the_models(
    setting: str, threads: int, weights: int, cores: int, expected: list[int]
) -> None:
    assert worker_specs(setting, threads, weights, cores) == [WorkerSpec("cpu", share) for share in expected]


@pytest.mark.usefixtures("gpus")
def test_a_gpu_gets_a_process() -> None:
    assert worker_specs("auto", 0, SMALL, 16) == [WorkerSpec("cuda:0", 0), WorkerSpec("cuda:1", 0)]
    assert worker_specs("cuda:1,cpu", 0, LARGE, 16) == [WorkerSpec("cuda:1", 0), WorkerSpec("cpu", 16)]


@pytest.mark.usefixtures("no_gpu")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="not on this machine"):
        worker_specs("cuda:0", 0, SMALL, 16)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("max 100000\n", 8),
        ("nothing\n", 8),
        (None, 8),
    ],
)
def test_a_container_has_the_cores_of_its_quota(
    text: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    quota = tmp_path / "cpu.max"
    if text is not None:
        quota.write_text(text)
    assert usable_cores(quota) == cores
