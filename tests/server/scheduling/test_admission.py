"""Admission, forecasts and deadlines of the scheduler."""

from __future__ import annotations

import random

import pytest

from tests.server.scheduling.helpers import ONE, TWO, finished, offered, scheduler, taken
from tests.server.scheduling.simulation import DECODE_S, STUDENT_S, Simulation, job


def test_the_steps_of_one_image_are_foreseen_one_after_the_other() -> None:
    """With others' they share passes, with each other never."""
    queue = scheduler(limit=8)
    found = queue.forecast(job(TWO))
    assert found.alone == found.finish == pytest.approx(2 * STUDENT_S + DECODE_S)
    late = job(TWO, deadline=1.5 * STUDENT_S + DECODE_S)
    refusal = queue.admit(late, 0.0)
    assert refusal is not None and refusal.finish == pytest.approx(2 * STUDENT_S + DECODE_S)


def test_costs_that_wander_are_no_pace() -> None:
    """A cost that rises makes all that waits dearer, not the pass that told of it slower."""
    draw = random.Random(1)
    queue = scheduler(limit=1)
    now = 0.0
    for _ in range(600):
        while queue.depth < 40:
            offered(queue, job(ONE, at=now))
        work, seconds = taken(queue), STUDENT_S * draw.uniform(0.8, 1.2)
        now += seconds + DECODE_S
        queue.finish(work, seconds, DECODE_S, now)
    queue_s = (queue.depth + 1) * (STUDENT_S + DECODE_S)
    assert queue.forecast(job(ONE, at=now)).finish == pytest.approx(queue_s, rel=0.2)


def test_one_deadline_far_off_keeps_no_others() -> None:
    queue = scheduler()
    offered(queue, job(ONE, deadline=3600.0, priority=-1))
    for _ in range(1000):
        offered(queue, job(ONE, deadline=3601.0))
        finished(queue, taken(queue))
    assert len(queue._deadlines) < 200


def test_the_bound_counts_waiting_images_and_refuses_a_job_as_a_whole() -> None:
    queue = scheduler(queue_size=5)
    offered(queue, job(ONE, count=3))
    refusal = queue.admit(job(ONE, count=3), 0.0)
    assert refusal is not None and refusal.reason == "full" and refusal.start > 0
    offered(queue, job(ONE, count=2))
    assert queue.depth == 5
    work = taken(queue)
    assert queue.depth == 5 - len(work.samples)
    finished(queue, work)
    assert queue.admit(job(ONE, count=5 - queue.depth), 0.0) is None


def test_an_unreachable_deadline_is_refused_at_once_with_a_prediction() -> None:
    queue = scheduler(limit=1)
    offered(queue, *[job(ONE) for _ in range(10)])
    refusal = queue.admit(job(ONE, deadline=0.100), 0.0)
    assert refusal is not None and refusal.reason == "deadline"
    assert refusal.start == pytest.approx(10 * (STUDENT_S + DECODE_S))
    surely = (11 + 10 / 2) * (STUDENT_S + DECODE_S)  # the wait may be half as long again
    assert refusal.finish == pytest.approx(surely)
    assert queue.depth == 10
    assert queue.admit(job(ONE, deadline=surely - 0.001), 0.0) is not None
    assert queue.admit(job(ONE, deadline=surely + 0.001), 0.0) is None
    urgent = job(ONE, deadline=0.020, priority=1)
    assert queue.admit(urgent, 0.0) is None, "work of lower priority is not in its way"


def test_what_is_refused_could_not_have_been_in_time_and_what_is_accepted_is() -> None:
    """Three times more than the device can do, with deadlines: the promise of the admission."""
    draw = random.Random(1)
    arrivals, at = [], 0.0
    for _ in range(3000):
        at += draw.expovariate(3 * 8 / (STUDENT_S + 8 * DECODE_S))
        arrivals.append(job(ONE, at, deadline=at + 0.25))
    run = Simulation.of(arrivals).run()
    assert len(run.refused) > 1500
    assert all(r.reason == "deadline" for r in run.refused.values())
    late = [j for j in run.done if run.done[j] > (j.deadline or 0)] + run.expired
    assert len(late) <= 0.01 * len(run.done)
    capacity = 8 / (STUDENT_S + 8 * DECODE_S)
    assert len(run.done) / run.now >= 0.9 * capacity


def test_promises_hold_where_the_time_between_passes_is_not_the_device_s() -> None:
    """A pass takes half as long again as the device says, as with a server that shares its cores."""
    draw = random.Random(1)
    capacity = 8 / (STUDENT_S + 8 * DECODE_S) / 1.5
    arrivals, at = [], 0.0
    for _ in range(3000):
        at += draw.expovariate(3 * capacity)
        arrivals.append(job(ONE, at, deadline=at + 0.5))
    run = Simulation.of(arrivals)
    run.slower = 1.5
    run.run()
    late = [j for j in run.done if run.done[j] > (j.deadline or 0)] + run.expired
    assert len(late) <= 0.02 * len(run.done)
    assert len(run.done) / run.now >= 0.9 * capacity


def test_a_slow_device_is_no_wait_for_others() -> None:
    """Else a long plan would be taken for one that waits, and get a cheaper one on an idle server."""
    run = Simulation.of([job(ONE, 0.01 * number) for number in range(50)])
    run.slower = 3.0
    run.run()
    start, finish, alone = run.scheduler.forecast(job(ONE, run.now))
    assert start == 0 and finish == alone > 1.2 * (STUDENT_S + DECODE_S)


def test_what_runs_is_not_given_up_before_its_deadline() -> None:
    queue = scheduler()
    offered(queue, job(ONE, deadline=1.0))
    taken(queue)
    assert queue.expired(0.999) == []
    assert len(queue.expired(1.0)) == 1


def test_what_has_passed_its_deadline_costs_nothing() -> None:
    queue = scheduler()
    waits, stays = job(ONE, deadline=1.0), job(ONE)
    offered(queue, waits, stays)
    assert queue.next_deadline == pytest.approx(1.0 - STUDENT_S - DECODE_S), "the last moment to begin"
    assert queue.expired(0.9) == []
    [late] = queue.expired(1.1)
    queue.end(late)
    assert [s.job for s in taken(queue).samples] == [stays]
