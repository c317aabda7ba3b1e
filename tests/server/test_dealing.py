"""A request's images on several devices: which of them, in what order, and all or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from dd_core.plan import one_step
from server.devices import dealing
from server.devices.dealing import Part, dispatch
from server.devices.worker import Watch
from server.errors import ComputeError, QueueFullError
from server.generation.encoder import Pixels
from server.scheduling.backlog import Forecast
from server.scheduling.jobs import Job
from tests.server.simulation import job

PLAN = one_step(64)


@dataclass
class Worker:
    """Takes `each` seconds an image and `once` a batch, after what is ahead of it."""

    backlog: float = 0.0
    each: float = 1.0
    once: float = 0.0
    full: bool = False
    jobs: dict[Job, asyncio.Future[list[Pixels]]] = field(default_factory=dict)
    watches: dict[Job, Watch | None] = field(default_factory=dict)
    canceled: list[Job] = field(default_factory=list)

    def forecast(self, job: Job) -> Forecast:
        alone = self.once + job.count * self.each
        return Forecast(self.backlog, self.backlog + alone, alone)

    def submit(self, job: Job, watch: Watch | None = None) -> asyncio.Future[list[Pixels]]:
        if self.full:
            raise QueueFullError("full", retry_after=1)
        self.jobs[job] = asyncio.get_running_loop().create_future()
        self.watches[job] = watch
        return self.jobs[job]

    def cancel(self, job: Job) -> None:
        self.canceled.append(job)

    def finish(self, at: float, compute_s: float = 0.5) -> None:
        """Answers everything with pictures whose values are the seeds' numbers."""
        for taken, future in self.jobs.items():
            taken.finished, taken.compute_s = at, compute_s
            pictures = [np.full((1, 1, 3), key.index, np.uint8) for key in taken.keys]
            for index, pixels in enumerate(pictures):
                if (watch := self.watches[taken]) is not None:
                    watch(index, pixels, True)
            future.set_result(pictures)


def dealt(asked: Job, *workers: Worker) -> list[Part]:
    return dispatch(asked, workers)  # type: ignore[arg-type]


def counts(parts: list[Part]) -> list[tuple[float, int]]:
    return [(part.worker.backlog, part.job.count) for part in parts]


def run(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scene())


@pytest.mark.parametrize(
    ("count", "backlogs", "expected"),
    [
        (1, [3.0, 1.0, 2.0], [(1.0, 1)]),
        (4, [0.0], [(0.0, 4)]),
        (4, [0.0, 0.5], [(0.0, 2), (0.5, 2)]),
        (5, [0.5, 0.0], [(0.0, 3), (0.5, 2)]),
        (7, [0.0, 0.1, 0.2], [(0.0, 3), (0.1, 2), (0.2, 2)]),
        (2, [0.0, 0.0, 0.0], [(0.0, 1), (0.0, 1)]),
        (4, [0.0, 2.0], [(0.0, 4)]),  # no sooner
        (4, [0.0, 0.5, 9.0], [(0.0, 2), (0.5, 2)]),
    ],
)
def test_images_go_where_the_last_is_done_soonest(
    count: int, backlogs: list[float], expected: list[tuple[float, int]]
) -> None:
    asked = job(PLAN, count=count)
    parts = dealt(asked, *(Worker(backlog) for backlog in backlogs))
    assert counts(parts) == expected
    assert sum((part.job.keys for part in parts), ()) == asked.keys
    assert [part.first for part in parts] == [
        sum(p.job.count for p in parts[:place]) for place in range(len(parts))
    ]


def test_where_a_batch_costs_the_same_a_job_stays_whole() -> None:
    asked = job(PLAN, count=8)
    [part] = dealt(asked, *(Worker(each=0.0, once=1.0) for _ in range(4)))
    assert part.job is asked


def test_parts_keep_what_was_asked_for() -> None:
    asked = job(PLAN, 5.0, count=4, priority=1, deadline=9.0, previews=True)
    for part in dealt(asked, Worker(), Worker()):
        found = part.job
        assert (found.model, found.plan, found.condition) == (asked.model, asked.plan, asked.condition)
        assert (found.submitted, found.priority, found.deadline, found.previews) == (5.0, 1, 9.0, True)


def test_the_forecast_is_from_the_first_start_to_the_last_end() -> None:
    parts = dealt(job(PLAN, count=5), Worker(0.5), Worker(0.25))
    assert dealing.forecast(parts) == Forecast(0.25, 3.25, 3.0)


def test_pictures_are_in_order_and_times_are_those_of_the_last_part() -> None:
    async def scene() -> None:
        first, second = Worker(0.0), Worker(0.1)
        asked = job(PLAN, 1.0, count=5)
        seen: list[tuple[int, int, bool]] = []
        answer = dealing.submit(
            asked,
            dealt(asked, first, second),
            lambda index, pixels, last: seen.append((index, int(pixels[0, 0, 0]), last)),
        )
        second.finish(at=2.0, compute_s=0.75)
        await asyncio.sleep(0)
        assert not answer.done()
        assert (asked.finished, asked.compute_s) == (2.0, 0.75)
        first.finish(at=1.75, compute_s=0.25)
        assert [int(pixels[0, 0, 0]) for pixels in await answer] == [0, 1, 2, 3, 4]
        assert seen == [(number, number, True) for number in (3, 4, 0, 1, 2)]
        assert (asked.finished, asked.compute_s, asked.queue_s) == (2.0, 0.75, 0.25)

    run(scene)


def test_a_part_that_is_refused_takes_the_others_back() -> None:
    async def scene() -> None:
        first, second = Worker(0.0), Worker(0.1, full=True)
        asked = job(PLAN, count=4)
        with pytest.raises(QueueFullError):
            dealing.submit(asked, dealt(asked, first, second), None)
        assert first.canceled == list(first.jobs)

    run(scene)


def test_a_part_that_fails_ends_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """The second failure is nobody's news any more."""

    async def scene() -> None:
        workers = [Worker(), Worker(), Worker()]
        asked = job(PLAN, count=3)
        answer = dealing.submit(asked, dealt(asked, *workers), None)
        for worker, message in zip(workers, ("mine", "late"), strict=False):
            [future] = worker.jobs.values()
            future.set_exception(ComputeError(message))
        with pytest.raises(ComputeError, match="mine"):
            await answer
        await asyncio.sleep(0)
        assert workers[2].canceled == list(workers[2].jobs)
        del future, answer, workers

    run(scene)
    assert "never retrieved" not in caplog.text


def test_a_client_that_leaves_cancels_every_part() -> None:
    async def scene() -> None:
        workers = [Worker(), Worker()]
        asked = job(PLAN, count=4)
        answer = dealing.submit(asked, dealt(asked, *workers), None)
        answer.cancel()
        await asyncio.sleep(0)
        assert [worker.canceled for worker in workers] == [list(worker.jobs) for worker in workers]

    run(scene)
