"""The order of passes, as pure logic on a simulated clock."""

from __future__ import annotations

import pytest

from server.scheduling.jobs import Job
from server.scheduling.scheduler import SHARES
from tests.server.scheduling.helpers import (
    ONE,
    SHORT,
    TEACHER,
    TWO,
    finished,
    offered,
    rest,
    scheduler,
    taken,
)
from tests.server.scheduling.simulation import DECODE_S, STUDENT_S, TEACHER_S, Simulation, job


def test_a_student_pass_mixes_requests_plans_and_steps() -> None:
    """The third idea: a student takes a step per sample."""
    queue = scheduler()
    first, two = job(ONE), job(TWO, count=2)
    offered(queue, two)
    assert finished(queue, taken(queue)) == []
    offered(queue, first)
    mixed = taken(queue)
    assert {(s.job, s.at.segment) for s in mixed.samples} == {(two, 1), (first, 0)}
    assert len(mixed.finishing) == 3
    assert set(finished(queue, mixed)) == {first, two}


def test_a_teacher_batch_goes_on_in_step_and_others_wait_for_the_next() -> None:
    queue = scheduler()
    offered(queue, job(SHORT, count=2))
    begun = taken(queue)
    assert begun.teacher_batch is not None and len(begun.samples) == 2
    offered(queue, job(SHORT))
    finished(queue, begun)
    following = taken(queue)
    assert following.samples == begun.samples
    assert following.teacher_batch is begun.teacher_batch


def test_a_one_step_request_waits_for_no_more_than_a_pass_of_a_teacher() -> None:
    background = [job(TEACHER, at=0.002 * k, count=4) for k in range(40)]
    quick = [job(ONE, at=0.05 + 0.1 * k) for k in range(20)]
    fair = Simulation.of(background + quick).run()
    alone = STUDENT_S + DECODE_S
    assert max(fair.latency(q) for q in quick) <= alone + TEACHER_S + DECODE_S


def test_a_teacher_gets_its_share_while_students_never_end() -> None:
    quick = [job(ONE, at=0.004 * k) for k in range(2000)]
    slow = job(TEACHER, at=1.0)
    run = Simulation.of([*quick, slow], limit=1).run()
    work = 16 * TEACHER_S
    assert run.done[slow] < max(run.done[q] for q in quick), "it waited for the last student"
    assert run.latency(slow) <= 1.5 * work / SHARES["heavy"] + STUDENT_S + DECODE_S


def test_who_holds_a_place_that_others_wait_for_gives_it_up_in_time() -> None:
    """Cohorts of low priority fill the device's places; students of a higher one never end."""
    queue = scheduler(limit=1, max_teacher_batches=2)
    for deadline in (None, 0.45):  # the second is due first, so it begins beside the first
        offered(queue, job(TEACHER, priority=-1, deadline=deadline))
        finished(queue, taken(queue), 0.0)
    assert {s.job.deadline for c in queue._teacher_batches for s in c.samples} == {None, 0.45}
    waiting = job(TEACHER)
    offered(queue, waiting)
    done: list[Job] = []
    for _ in range(400):
        offered(queue, job(ONE))
        done += finished(queue, taken(queue))
    assert waiting in done


def test_a_short_hybrid_overtakes_a_long_teacher() -> None:
    long, short = job(TEACHER), job(SHORT, at=0.0)
    queue = scheduler()
    offered(queue, long)
    finished(queue, taken(queue))
    offered(queue, short)
    assert rest(queue) == [short, long]


def test_no_more_teacher_batches_than_allowed() -> None:
    queue = scheduler(max_teacher_batches=1)
    offered(queue, job(TEACHER))
    finished(queue, taken(queue))
    offered(queue, job(SHORT))
    seen = {taken(queue).teacher_batch}
    assert len(seen) == 1


def test_priority_goes_before_everything() -> None:
    queue = scheduler(limit=1)
    normal, low, high = job(ONE), job(ONE, priority=-1), job(TEACHER, priority=1)
    offered(queue, low, normal, high)
    assert rest(queue) == [high, normal, low]


def test_an_earlier_deadline_goes_first() -> None:
    queue = scheduler(limit=1)
    easy, hard = job(ONE), job(ONE, deadline=0.035)
    offered(queue, easy, hard)
    assert rest(queue) == [hard, easy]


def test_timings_of_a_job_add_up() -> None:
    queue = scheduler(limit=2)
    large = job(ONE, count=5)
    offered(queue, large)
    now = 0.0
    while (work := queue.next_batch()) is not None:
        now += 0.5
        complete = queue.finish(work, 0.2, 0.05, now)
    assert complete == [large]
    assert large.compute_s == pytest.approx(0.75)
    assert large.queue_s == pytest.approx(0.75)
