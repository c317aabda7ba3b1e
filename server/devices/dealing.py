"""One request, several devices: its images are dealt out so that the last of them is done soonest.

    job ─ deal ─▶ Parts, each the job of one worker ─ submit ─▶ all images, in order

Where a batch costs the same whatever is in it, as in exact mode on a GPU, nothing is gained and the job stays
whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import NamedTuple

from server.devices.worker import DeviceWorker, Watch
from server.generation.encoder import Pixels
from server.scheduling.backlog import Forecast
from server.scheduling.jobs import Job


class Part(NamedTuple):
    """Images `first`, `first` + 1, … of a job, as a job of `worker`."""

    worker: DeviceWorker
    job: Job
    first: int


def dispatch(job: Job, workers: Sequence[DeviceWorker]) -> list[Part]:
    """All for the worker with the least work ahead, or even parts for some, if they are done sooner.

    Args:
        workers: at least one.
    """
    ordered = sorted(workers, key=attrgetter("backlog")) if len(workers) > 1 else workers
    best = [Part(ordered[0], job, 0)]
    for count in range(2, min(job.count, len(ordered)) + 1):
        parts = _evenly(job, ordered[:count])
        if forecast(parts).finish >= forecast(best).finish:
            break
        best = parts
    return best


def forecast(parts: Sequence[Part]) -> Forecast:
    """When the first of them would start and the last be done."""
    found = [part.worker.forecast(part.job) for part in parts]
    return Forecast(
        min(one.start for one in found), max(one.finish for one in found), max(one.alone for one in found)
    )


def submit(job: Job, parts: Sequence[Part], watch: Watch | None) -> asyncio.Future[list[Pixels]]:
    """Queue all parts or none; as `DeviceWorker.submit`. Cancel the future to cancel them.

    Raises:
        QueueFullError, DeadlineUnreachableError, DrainingError: one of them is refused.
    """
    if len(parts) == 1:
        return parts[0].worker.submit(job, watch)
    answers: list[asyncio.Future[list[Pixels]]] = []
    try:
        for part in parts:
            relay = None if watch is None else partial(_relay, job, part, watch)
            answers.append(part.worker.submit(part.job, relay))
    except Exception:
        _cancel(parts)
        raise
    whole: asyncio.Future[list[Pixels]] = asyncio.get_running_loop().create_future()

    def settle(answer: asyncio.Future[list[Pixels]]) -> None:
        error = None if answer.cancelled() else answer.exception()
        if whole.done():
            return
        if error is not None:
            whole.set_exception(error)
        elif all(one.done() for one in answers):
            for part in parts:
                _take_times(job, part.job)
            whole.set_result([pixels for one in answers for pixels in one.result()])

    for answer in answers:
        answer.add_done_callback(settle)
    whole.add_done_callback(lambda _: _cancel(parts))
    return whole


def _evenly(job: Job, workers: Sequence[DeviceWorker]) -> list[Part]:
    each, more = divmod(job.count, len(workers))
    parts, first = [], 0
    for number, worker in enumerate(workers):
        last = first + each + (number < more)
        parts.append(Part(worker, replace(job, keys=job.keys[first:last]), first))
        first = last
    return parts


def _relay(job: Job, part: Part, watch: Watch, index: int, pixels: Pixels, finished: bool) -> None:
    _take_times(job, part.job)
    watch(part.first + index, pixels, finished)


def _take_times(job: Job, part: Job) -> None:
    """Those of the part that was done last."""
    if part.finished >= job.finished:
        job.finished, job.compute_s = part.finished, part.compute_s


def _cancel(parts: Sequence[Part]) -> None:
    for part in parts:
        part.worker.cancel(part.job)
