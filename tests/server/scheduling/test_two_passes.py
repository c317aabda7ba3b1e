"""A pass that is formed while the one before it runs."""

from __future__ import annotations

import pytest

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
from tests.server.scheduling.simulation import job


def test_they_share_no_image_and_what_both_hold_does_not_wait() -> None:
    queue = scheduler(limit=2)
    offered(queue, job(ONE, count=3), job(TWO, count=2))
    first, second = taken(queue), taken(queue)
    assert len(first.samples) == len(second.samples) == 2 and not {*first.samples} & {*second.samples}
    assert queue.depth == 1
    assert finished(queue, first) == []
    assert queue.depth == 1, "its images are done, those of the second still run"
    finished(queue, second)
    rest(queue)
    assert not queue.jobs and queue.depth == 0 and queue.backlog.seconds() == 0


def test_an_image_goes_on_once_its_pass_is_done() -> None:
    queue = scheduler()
    two = job(TWO)
    offered(queue, two)
    first = taken(queue)
    assert queue.next_batch() is None
    finished(queue, first)
    assert finished(queue, taken(queue)) == [two]


def test_a_teacher_batch_runs_one_pass_at_a_time_and_counts_while_it_does() -> None:
    queue = scheduler(max_teacher_batches=1)
    offered(queue, job(TEACHER), job(SHORT))
    first = taken(queue)
    assert first.teacher_batch is not None
    assert queue.next_batch() is None, "neither its next pass nor another teacher batch"
    finished(queue, first)
    assert taken(queue).teacher_batch is first.teacher_batch


def test_another_teacher_batch_may_run_next() -> None:
    queue = scheduler(max_teacher_batches=2)
    offered(queue, job(TEACHER), job(SHORT))
    first, second = taken(queue), taken(queue)
    assert first.teacher_batch is not None and second.teacher_batch is not None
    assert first.teacher_batch is not second.teacher_batch
    finished(queue, first)
    finished(queue, second)
    assert len(rest(queue)) == 2


def test_lanes_get_their_shares_of_both() -> None:
    """The pass that runs counts with what it should take: three light passes to one heavy one, in time."""
    queue = scheduler(limit=1)
    offered(queue, *[job(ONE) for _ in range(30)], job(TEACHER), job(TEACHER))
    running, light, heavy = [taken(queue)], 0.0, 0.0
    for _ in range(30):
        running.append(taken(queue))
        done = running.pop(0)
        took = queue.expected(done)
        light, heavy = (light + took, heavy) if done.work.kind == "student" else (light, heavy + took)
        queue.finish(done, took, 0.0, 1.0)
    assert light / (light + heavy) == pytest.approx(SHARES["light"], abs=0.06)


def test_who_leaves_during_the_second_pass_is_dropped_once() -> None:
    queue = scheduler()
    first, second = job(ONE), job(TWO)
    offered(queue, first)
    running = taken(queue)
    offered(queue, second)
    ahead = taken(queue)
    [left] = ahead.samples
    queue.end(second)
    assert queue.dropped == [left.number]
    assert finished(queue, running) == [first] and finished(queue, ahead) == []
    assert queue.dropped == [left.number] and queue.next_batch() is None and queue.depth == 0


def test_a_failure_of_the_first_leaves_the_second_alone() -> None:
    queue = scheduler(limit=2)
    bad, good = job(ONE, count=2), job(ONE, count=2)
    offered(queue, bad, good)
    first, second = taken(queue), taken(queue)
    assert queue.split(first, out_of_memory=False) is None
    assert finished(queue, second) == [good]
    assert [len(taken(queue).samples) for _ in range(2)] == [1, 1]


def test_a_death_is_the_firsts_and_both_begin_again() -> None:
    queue = scheduler(limit=2)
    at_work, ahead = job(ONE, count=2), job(ONE, count=2)
    offered(queue, at_work, ahead)
    taken(queue), taken(queue)
    assert queue.restart(crashed=True) is None
    assert (at_work.crashes, ahead.crashes) == (1, 0) and queue.depth == 4
    sizes = {}
    while (work := queue.next_batch()) is not None:
        sizes.setdefault(work.samples[0].job, []).append(len(work.samples))
        finished(queue, work)
    assert sizes == {at_work: [1, 1], ahead: [2]}


def test_passes_end_in_their_order() -> None:
    queue = scheduler(limit=1)
    offered(queue, job(ONE), job(ONE))
    _, second = taken(queue), taken(queue)
    with pytest.raises(AssertionError, match="in the order"):
        finished(queue, second)
