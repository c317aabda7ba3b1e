"""Jobs that end early, passes that fail and devices that die, as the scheduler sees them."""

from __future__ import annotations

import random

import pytest

from benchmarks.fifo_server import FifoScheduler
from server.scheduling.jobs import Job
from server.scheduling.scheduler import Scheduler
from tests.server.scheduling.helpers import (
    ONE,
    PLANS,
    SHORT,
    TEACHER,
    finished,
    offered,
    rest,
    scheduler,
    taken,
)
from tests.server.scheduling.simulation import costs, job


def test_a_job_that_ends_frees_its_room_and_is_dropped_from_the_device() -> None:
    queue = scheduler()
    gone, stays = job(TEACHER, count=3), job(ONE)
    offered(queue, gone)
    work = taken(queue)
    finished(queue, work)
    offered(queue, stays)
    queue.end(gone)
    assert queue.depth == 1
    assert work.teacher_batch is not None
    assert set(queue.dropped) == {work.teacher_batch.number, *(s.number for s in gone.samples)}
    assert rest(queue) == [stays]
    assert queue.backlog.seconds() == 0


def test_a_job_that_ends_while_it_runs_is_not_complete_and_leaves_nothing() -> None:
    queue = scheduler()
    gone = job(SHORT, count=2)
    offered(queue, gone)
    work = taken(queue)
    queue.end(gone)
    assert finished(queue, work) == []
    assert queue.next_batch() is None and queue.depth == 0
    assert work.teacher_batch is not None and work.teacher_batch.number in queue.dropped


def test_a_failed_batch_is_halved_until_the_guilty_one_is_alone() -> None:
    queue = scheduler()
    jobs = [job(ONE) for _ in range(7)]
    bad = jobs[4]
    offered(queue, *jobs)
    done, tries = [], 0
    while (work := queue.next_batch()) is not None:
        tries += 1
        if any(s.job is bad for s in work.samples):
            guilty = queue.split(work, out_of_memory=False)
            if guilty is not None:
                assert guilty is bad
                queue.end(guilty)
        else:
            done += finished(queue, work)
    assert set(done) == set(jobs) - {bad}
    assert tries <= 8
    assert queue.depth == 0 and queue.backlog.seconds() == 0


def test_a_batch_that_does_not_fit_is_not_tried_again() -> None:
    queue = scheduler()
    jobs = [job(ONE) for _ in range(16)]
    offered(queue, *jobs)
    sizes, done = [], []
    while (work := queue.next_batch()) is not None:
        sizes.append(len(work.samples))
        if len(work.samples) > 2:
            assert queue.split(work, out_of_memory=True) is None
        else:
            done += finished(queue, work)
    assert set(done) == set(jobs)
    assert sizes.count(8) == 1
    offered(queue, *[job(ONE) for _ in range(8)])
    assert len(taken(queue).samples) <= 2


def test_a_teacher_batch_that_fails_begins_again_in_halves() -> None:
    queue = scheduler()
    jobs = [job(SHORT) for _ in range(4)]
    offered(queue, *jobs)
    finished(queue, taken(queue))
    second = taken(queue)
    assert second.teacher_batch is not None
    assert queue.split(second, out_of_memory=False) is None
    half = taken(queue)
    assert half.teacher_batch is not None and half.teacher_batch.passes_left == 4 and len(half.samples) == 2
    finished(queue, half)
    assert set(rest(queue)) == set(jobs)


def test_after_a_death_all_begin_again_and_the_suspects_alone() -> None:
    queue = scheduler()
    suspects, waits = job(ONE, count=3), job(TEACHER)
    offered(queue, waits)
    finished(queue, taken(queue))
    offered(queue, suspects)
    dying = taken(queue)
    assert {s.job for s in dying.samples} == {suspects}
    assert queue.restart(crashed=True) is None
    assert queue.depth == 4 and not queue.dropped
    sizes = []
    while (work := queue.next_batch()) is not None:
        if work.work.kind == "student":
            sizes.append(len(work.samples))
        finished(queue, work)
    assert sizes == [1, 1, 1]
    assert suspects.over and waits.over and queue.backlog.seconds() == 0


@pytest.mark.parametrize(
    ("deaths", "given_up"),
    [
        ("cc", True),  # c = crashes of its own, k = is killed from outside
        ("kk", False),
        ("kkk", True),
        ("kc", False),
        ("ck", False),
        ("kkc", False),
        ("ckk", False),
        ("kckc", True),
        ("kckk", True),
    ],
)
def test_a_request_is_given_up_after_two_crashes_or_three_kills(deaths: str, given_up: bool) -> None:
    """The first death is shared with another request, which is not blamed for it."""
    queue = scheduler()
    bad, good = job(ONE), job(ONE)
    offered(queue, bad, good)
    *before, last = [death == "c" for death in deaths]
    for number, crashed in enumerate(before):
        assert [s.job for s in taken(queue).samples] == [bad, good][: 1 if number else 2]
        assert queue.restart(crashed=crashed) is None
    assert [s.job for s in taken(queue).samples] == [bad]
    assert queue.restart(crashed=last) is (bad if given_up else None)
    if given_up:
        queue.end(bad)
    assert rest(queue) == ([good] if given_up else [bad, good])


def test_the_deaths_of_a_device_count_for_the_request_whatever_image_of_it_it_was_at() -> None:
    queue = scheduler()
    asked = job(ONE, count=3)
    offered(queue, asked)
    taken(queue)
    assert queue.restart(crashed=False) is None
    taken(queue)
    assert queue.restart(crashed=False) is None
    finished(queue, taken(queue))
    taken(queue)
    assert queue.restart(crashed=False) is asked


@pytest.mark.parametrize("kind", [Scheduler, FifoScheduler])
def test_everything_ends_whatever_comes(kind: type[Scheduler]) -> None:
    """Random plans, sizes, priorities, deadlines and departures: nothing is lost, nothing stays."""
    draw = random.Random(7)
    queue = kind(costs(8, PLANS), 64)
    alive: list[Job] = []
    done: list[Job] = []
    admitted, ended, now = 0, 0, 0.0
    for _ in range(4000):
        now += draw.expovariate(100)
        choice = draw.random()
        if choice < 0.35:
            deadline = now + draw.uniform(0.01, 2.0) if draw.random() < 0.3 else None
            new = job(
                draw.choice(PLANS), now, draw.randint(1, 5), priority=draw.randint(-1, 1), deadline=deadline
            )
            if queue.admit(new, now) is None:
                alive.append(new)
                admitted += 1
        elif choice < 0.4 and alive:
            gone = draw.choice(alive)
            queue.end(gone)
            ended += 1
        else:
            for late in queue.expired(now):
                queue.end(late)
                ended += 1
            work = queue.next_batch()
            if work is not None and draw.random() < 0.05:
                guilty = queue.split(work, out_of_memory=False)
                if guilty is not None:
                    queue.end(guilty)
                    ended += 1
            elif work is not None and draw.random() < 0.02:
                hopeless = queue.restart(crashed=draw.random() < 0.5)
                if hopeless is not None:
                    queue.end(hopeless)
                    ended += 1
            elif work is not None:
                done += finished(queue, work, now)
        alive = [a for a in alive if not a.over]
    done += rest(queue)
    assert len(done) + ended == admitted
    assert queue.depth == 0 and queue.jobs == [] and queue.backlog.seconds() == 0
    assert len(set(done)) == len(done)
