"""Recording on a CUDA device, with PyTorch's part made up: when it is tried, and what follows if it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from types import SimpleNamespace

import pytest
import torch

from dd_core.engine import cuda
from dd_core.engine.cuda import CudaGraphs, is_lost, settle

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes of the recordings that were begun; each runs as the test says in `raises`."""
    found: list[str] = []

    @contextmanager
    def graph(_: object, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream) == ("pool", "stream")
        found.append(capture_error_mode)
        yield

    monkeypatch.setattr(cuda, "_stream", lambda _: "stream")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return found


def _failing_at(call: int, error: Exception) -> Callable[[], None]:
    calls = iter(range(1, 100))

    def function() -> None:
        if next(calls) == call:
            raise error

    return function


def test_a_pass_is_recorded_so_that_other_threads_may_allocate(tried: list[str]) -> None:
    graphs, runs = CudaGraphs(DEVICE, Lock()), []
    assert graphs.record(lambda: runs.append(1), 0) is not None
    assert tried == ["thread_local"] and len(runs) == 2, "once for what is made once, once recorded"


def test_while_a_model_loads_nothing_is_recorded(tried: list[str]) -> None:
    loading, runs = Lock(), []
    graphs = CudaGraphs(DEVICE, loading)
    with loading:
        assert graphs.record(lambda: runs.append(1), 0) is None
    assert (len(runs), tried) == (1, [])
    assert graphs.record(lambda: runs.append(1), 0) is not None and not loading.locked()


def test_what_cannot_be_recorded_still_runs(tried: list[str]) -> None:
    loading = Lock()
    graphs = CudaGraphs(DEVICE, loading)
    error = RuntimeError("operation not permitted when stream is capturing")
    assert graphs.record(_failing_at(2, error), 0) is None
    assert graphs.record(lambda: None, 1) is None and len(tried) == 1, "it is not tried for ever"
    assert not loading.locked()


@pytest.mark.parametrize("call", [1, 2])
def test_memory_that_runs_out_is_the_passs_own_failure(tried: list[str], call: int) -> None:
    """A smaller pass is recorded after it."""
    loading = Lock()
    graphs = CudaGraphs(DEVICE, loading)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.record(_failing_at(call, torch.OutOfMemoryError("full")), 0)
    assert not loading.locked() and graphs.record(lambda: None, 0) is not None


def test_a_cpu_has_no_errors_that_stay_and_nothing_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    settle(torch.device("cpu"))
    assert not is_lost(torch.device("cpu")) and torch.backends.cudnn.allow_tf32
