"""A batch on a CPU, by images instead of by operations: every thread has some to itself.

The threads that share an operation wait for each other at the end of it. A pass is hundreds of short
operations, and a thread that the machine takes away for a moment holds all others up. A thread that
has images to itself waits for nobody, and takes the next ones when it is done.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Images of a share, and shares of a thread, of which the quicker thread may take more.
_LEAST, _SHARES = 4, 2


def shares(images: int) -> list[slice]:
    """A batch in about equal parts to be run side by side; one part where they would be too small."""
    threads = torch.get_num_threads()
    number = threads * min(_SHARES, images // (_LEAST * threads)) if threads > 1 else 0
    ends = [images * k // max(1, number) for k in range(max(1, number) + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def each(function: Callable[[T], Tensor], lanes: Sequence[T]) -> list[Tensor]:
    """`function` of every lane, each on one thread, as many at a time as torch has threads.

    The order of results is that of `lanes`. The first exception of any is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(lane) for lane in lanes]
    inference = torch.is_inference_mode_enabled()  # of a thread, not of the process

    def run(lane: T) -> Tensor:
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
