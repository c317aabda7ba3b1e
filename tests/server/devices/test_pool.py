"""A request's images on several devices: which of them, in what order, and all or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dd_core.plan import one_step
from server.devices.messages import Load, Loaded
from server.devices.placement import WorkerSpec
from server.devices.pool import DevicePool, Part, combined_forecast, dispatch, submit_parts
from server.devices.submission import Submission
from server.errors import ComputeError, QueueFullError
from server.observability.metrics import Metrics
from server.scheduling.backlog import Forecast
from server.scheduling.jobs import Job
from server.settings import load_settings
from tests.server.scheduling.simulation import job

PLAN = one_step(64)


def _kind(hardware: list[str], arithmetic: str = "auto", **settings: int) -> str:
    """Of a server whose device processes have told what they run on."""
    specs = [WorkerSpec("cpu", 1)] * len(hardware)
    pool = DevicePool(
        load_settings(arithmetic=arithmetic, **settings), specs, Metrics(), lambda: None, lambda _: None
    )
    for worker, name in zip(pool._workers, hardware, strict=True):
        worker.supervisor._receive(Loaded(Load("any", Path()), None, name))
    return pool.kind


def test_pictures_of_other_devices_or_arithmetic_have_another_tag() -> None:
    """The server does not ask for a GPU's name itself: it would open the GPU, whose memory that takes."""
    assert len({_kind(["x86_64"], name) for name in ("auto", "bf16", "fp16")}) == 3
    assert _kind(["x86_64"], max_batch=32) == _kind(["x86_64", "x86_64"], max_batch=8)
    assert len({_kind(names) for names in (["x86_64"], ["H100"], ["H100", "L4"], ["L4", "H100"])}) == 3
    assert _kind(["x86_64"]) == f"{torch.__version__} x86_64"


@dataclass
class Worker:
    """Takes `each` seconds an image and `once` a batch, after what is ahead of it."""

    backlog: float = 0.0
    each: float = 1.0
    once: float = 0.0
    full: bool = False
    room: int = 100
    jobs: dict[Job, Submission] = field(default_factory=dict)
    canceled: list[Job] = field(default_factory=list)

    def forecast(self, job: Job) -> Forecast:
        alone = self.once + job.count * self.each
        return Forecast(self.backlog, self.backlog + alone, alone)

    def submit(self, job: Job, submission: Submission) -> None:
        if self.full:
            raise QueueFullError("full", retry_after=1)
        self.jobs[job] = submission

    def cancel(self, job: Job) -> None:
        self.canceled.append(job)

    def finish(self, at: float, compute_s: float = 0.5) -> None:
        """Answers everything with pictures whose values are the seeds' numbers."""
        for taken, submission in self.jobs.items():
            taken.finished, taken.compute_s = at, compute_s
            for index, origin in enumerate(taken.keys):
                pixels = np.full((1, 1, 3), origin.index, np.uint8)
                submission.deliver(taken, index, pixels, last=True)
            submission.complete(taken)

    def fail(self, message: str) -> None:
        for submission in self.jobs.values():
            submission.fail(ComputeError(message))


class Hasty(Worker):
    """Fails what it is given before it is asked for more, as a process that is found dead."""

    def submit(self, job: Job, submission: Submission) -> None:
        super().submit(job, submission)
        self.fail("at once")


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


def test_a_full_queue_is_passed_over_while_another_has_room() -> None:
    """Many cheap images are less work than a few dear ones, and fill a queue."""
    cheap, dear = Worker(1.0, room=0), Worker(2.0)
    assert counts(dealt(job(PLAN, count=1), cheap, dear)) == [(2.0, 1)]
    assert counts(dealt(job(PLAN, count=4), Worker(0.0, room=3), Worker(0.1), Worker(0.2))) == [
        (0.1, 2),
        (0.2, 2),
    ]
    both_full = Worker(1.0, room=0), Worker(2.0, room=0)
    assert counts(dealt(job(PLAN, count=1), *both_full)) == [(1.0, 1)], "which refuses it"


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
    assert combined_forecast(parts) == Forecast(0.25, 3.25, 3.0)


def test_pictures_have_their_place_and_times_are_those_of_the_last_part() -> None:
    async def scene() -> None:
        first, second = Worker(0.0), Worker(0.1)
        asked = job(PLAN, 1.0, count=5)
        submission = submit_parts(asked, dealt(asked, first, second))
        second.finish(at=2.0, compute_s=0.75)
        seen = [await anext(submission), await anext(submission)]
        assert not submission.over
        assert (asked.finished, asked.compute_s) == (2.0, 0.75)
        first.finish(at=1.75, compute_s=0.25)
        seen += [sampled async for sampled in submission]
        assert [(s.index, int(s.pixels[0, 0, 0]), s.last) for s in seen] == [
            (number, number, True) for number in (3, 4, 0, 1, 2)
        ]
        assert (asked.finished, asked.compute_s, asked.queue_s) == (2.0, 0.75, 0.25)
        assert first.canceled == second.canceled == []

    run(scene)


def test_a_part_that_is_refused_takes_the_others_back() -> None:
    first, second = Worker(0.0), Worker(0.1, full=True)
    asked = job(PLAN, count=4)
    with pytest.raises(QueueFullError):
        submit_parts(asked, dealt(asked, first, second))
    assert first.canceled == list(first.jobs)


def test_a_part_that_fails_ends_the_others() -> None:
    """The second failure is nobody's news any more."""

    async def scene() -> None:
        workers = [Worker(), Worker(), Worker()]
        asked = job(PLAN, count=3)
        submission = submit_parts(asked, dealt(asked, *workers))
        for worker, message in zip(workers, ("mine", "late"), strict=False):
            worker.fail(message)
        with pytest.raises(ComputeError, match="mine"):
            await anext(submission)
        assert workers[2].canceled == list(workers[2].jobs)

    run(scene)


def test_a_part_that_fails_before_the_next_is_queued_ends_that_too() -> None:
    async def scene() -> None:
        first, second = Hasty(0.0), Worker(0.1)
        asked = job(PLAN, count=4)
        submission = submit_parts(asked, dealt(asked, first, second))
        with pytest.raises(ComputeError, match="at once"):
            await anext(submission)
        assert second.canceled[-1:] == list(second.jobs)

    run(scene)


def test_a_client_that_leaves_cancels_every_part() -> None:
    async def scene() -> None:
        workers = [Worker(), Worker()]
        asked = job(PLAN, count=4)
        submission = submit_parts(asked, dealt(asked, *workers))
        submission.cancel()
        assert [worker.canceled for worker in workers] == [list(worker.jobs) for worker in workers]

    run(scene)
