"""Work that goes image by image on a CPU: one thread an image, all at once.

The threads that share an operation wait for each other at the end of it. Over one image that is hundreds
of short operations, and a thread that the machine takes away for a moment holds all others up. A thread
that has an image to itself waits for nobody, and takes the next one when it is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch
from torch import Tensor


def each(function: Callable[[Tensor], Tensor], lanes: Sequence[Tensor]) -> list[Tensor]:
    """`function` of every tensor, each on one thread, as many at a time as torch has threads.

    The order of results is that of `lanes`. The first exception of any is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(lane) for lane in lanes]
    inference = torch.is_inference_mode_enabled()  # of a thread, not of the process

    def run(lane: Tensor) -> Tensor:
        with torch.inference_mode(inference):
            return function(lane)

    return list(_pool(threads, os.getpid()).map(run, lanes))


def alike(function: Callable[[Tensor], Tensor], lane: Tensor) -> bool:
    """Whether `function` gives the same bits on one thread as on all that torch has."""
    [alone] = each(function, [lane])
    return torch.equal(alone, function(lane))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a fork has none of the threads
    pool, started = ThreadPoolExecutor(threads, "dd-lane"), Barrier(threads)

    def alone(_: int) -> None:
        started.wait()  # or one thread would take this twice
        torch.set_num_threads(1)
        torch.get_num_threads()  # the first question takes the process's number: it is 1 only now

    list(pool.map(alone, range(threads)))
    torch.set_num_threads(threads)  # what it says is also the default of threads that come later
    return pool
