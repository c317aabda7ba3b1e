"""A pass that is formed while the one before it runs."""

from __future__ import annotations

import dataclasses

import pytest

from dd_core.plan import Plan
from tests.server.scheduling.helpers import (
    ONE,
    TEACHER,
    TWO,
    finished,
    offered,
    rest,
    scheduler,
    taken,
)
from tests.server.scheduling.simulation import DECODE_S, STUDENT_S, job


def test_they_share_no_image_and_what_both_hold_does_not_wait() -> None:
    queue = scheduler(limit=2)
    jobs = [job(ONE, count=3), job(ONE, count=2)]
    offered(queue, *jobs)
    first, second = taken(queue), taken(queue)
    assert not first.ahead and second.ahead
    assert len(first.samples) == len(second.samples) == 2 and not {*first.samples} & {*second.samples}
    assert queue.depth == 1
    assert finished(queue, first) == []
    assert queue.depth == 1, "its images are done, those of the second still run"
    assert finished(queue, second) == [jobs[0]]
    assert rest(queue) == [jobs[1]] and queue.depth == 0 and queue.backlog.seconds() == 0


@pytest.mark.parametrize("plan", [TWO, TEACHER])
def test_where_images_go_on_the_next_pass_is_formed_at_the_answer(plan: Plan) -> None:
    """A pass that is sent ahead would always be somebody else's: an urgent teacher took seven times as long,
    and images at different steps never met.
    """
    queue = scheduler()
    urgent, others = job(plan, priority=1), job(ONE, count=20)
    offered(queue, urgent)
    running = taken(queue)
    offered(queue, others)
    assert queue.next_batch() is None
    finished(queue, running)
    assert {s.job for s in taken(queue).samples} >= {urgent}


def test_an_image_whose_client_has_left_does_not_go_on() -> None:
    queue = scheduler()
    left, waits = job(TWO), job(ONE)
    offered(queue, left)
    taken(queue)
    offered(queue, waits)
    assert queue.next_batch() is None
    queue.end(left)
    assert {s.job for s in taken(queue).samples} == {waits}


def test_lanes_keep_what_they_are_owed() -> None:
    """A heavy pass that runs is not taken for time that heavy work did not want."""
    queue = scheduler(limit=1)
    teacher = job(TEACHER)
    offered(queue, *[job(ONE) for _ in range(60)])
    for _ in range(6):
        finished(queue, taken(queue))
    offered(queue, teacher)
    while (running := taken(queue)).work.kind != "decode":
        finished(queue, running)
    owed = queue._used["light"] - queue._used["heavy"]
    assert taken(queue).work.kind == "student"
    assert queue._used["light"] - queue._used["heavy"] == owed


def test_an_answer_that_is_read_late_is_no_slowdown() -> None:
    """Of passes that were sent ahead: the device did not wait, and the next one seems as much shorter."""
    queue = scheduler(queue_size=400, limit=1)
    offered(queue, *[job(ONE) for _ in range(400)])
    passing, now = STUDENT_S + DECODE_S, 0.0
    running = [taken(queue)]
    for turn in range(300):
        running.append(taken(queue))
        now += passing
        read = now + (passing / 2 if turn % 2 else 0.0)
        queue.finish(running.pop(0), STUDENT_S, DECODE_S, read)
    assert queue.pace.slowdown == pytest.approx(1.0, abs=0.06)
    assert queue.costs.gap < 0.001


def test_a_prompt_takes_its_time_before_a_pass() -> None:
    queue = scheduler()
    first, second = (dataclasses.replace(job(ONE, count=2), condition="a red heart") for _ in range(2))
    offered(queue, first)
    running = taken(queue)
    before = queue.expected(running)
    queue.finish(running, STUDENT_S, 2 * DECODE_S, 1.0, text_seconds=0.010)
    offered(queue, second)
    assert queue.expected(taken(queue)) == pytest.approx(before + 0.010)


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
