"""A scheduler of plans of 16 blocks, and the steps of its owner."""

from __future__ import annotations

from dd_core.plan import few_steps, hybrid, one_step, teacher
from server.scheduling.jobs import Batch, Job
from server.scheduling.scheduler import Scheduler
from tests.server.scheduling.simulation import costs

ONE, TWO, TEACHER = one_step(16), few_steps(16, 4), teacher(16)
HYBRID, SHORT = hybrid(16, 2, 6), hybrid(16, 0, 4)
PLANS = (ONE, TWO, TEACHER, HYBRID, SHORT)


def scheduler(queue_size: int = 64, limit: int = 8, max_teacher_batches: int = 2) -> Scheduler:
    return Scheduler(costs(limit, PLANS), queue_size, max_teacher_batches)


def offered(queue: Scheduler, *jobs: Job) -> None:
    for each in jobs:
        assert queue.admit(each, each.submitted) is None


def taken(queue: Scheduler) -> Batch:
    work = queue.next_batch()
    assert work is not None
    return work


def finished(queue: Scheduler, work: Batch, now: float = 1.0) -> list[Job]:
    return queue.finish(work, 0.01, 0.004 * len(work.finishing), now)


def rest(queue: Scheduler) -> list[Job]:
    """Runs everything that waits; the jobs in the order in which they were done."""
    done = []
    while (work := queue.next_batch()) is not None:
        done += finished(queue, work)
    return done
