"""Graphs on a CUDA device, and what a process must know of one.

A graph is recorded on a lane's stream, in the mode in which other threads may allocate meanwhile. While a
model is being loaded, nothing is recorded and the pass runs operation by operation: at equal shapes the bytes
are the same. Graphs of a lane share a pool of memory, since one lane never runs two of them at once.

None of this has run on a GPU yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch

from dd_core.engine.graphs import Replay

log = logging.getLogger("dd_core.engine")
_LANES = 2


class CudaGraphs:
    """`dd_core.engine.graphs.Graphs` of a CUDA device.

    Args:
        loading: held by whoever loads a model, so that no recording begins; held while one is made.
    """

    def __init__(self, device: torch.device, loading: Lock, lanes: int = _LANES) -> None:
        self.lanes = lanes
        self._device, self._loading, self._failed = device, loading, False
        self._streams = [_stream(device) for _ in range(lanes)]
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(lanes)]

    def record(self, function: Callable[[], None], lane: int) -> Replay | None:
        """Run `function` on the lane, which `on` has made the current stream, then record and replay it."""
        function()  # also makes what a library makes once, which a graph could not hold
        if self._failed or not self._loading.acquire(blocking=False):
            return None
        try:
            graph = torch.cuda.CUDAGraph()
            recording = torch.cuda.graph(
                graph, self._pools[lane], self._streams[lane], capture_error_mode="thread_local"
            )
            with recording:
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            log.exception("a pass cannot be recorded: from now on all run operation by operation")
            self._failed = True
            return None
        finally:
            self._loading.release()
        graph.replay()  # recording computes nothing
        return graph.replay

    @contextmanager
    def on(self, lane: int) -> Iterator[None]:
        """The lane's stream as the current one; it waits for what was asked for before."""
        stream = self._streams[lane]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for all lanes."""
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            current.wait_stream(stream)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def settle(device: torch.device) -> None:
    """Make a device the one that this thread computes on (PyTorch would take the first), in float32 where it
    says so: PyTorch multiplies float32 as it is, but lets convolutions round to 10 bits. Of a CPU nothing.
    """
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False


def is_lost(device: torch.device) -> bool:
    """True where an error of a CUDA device stays: every later call fails as well, and only another process
    can use the device. Nothing of the kind is on a CPU.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
