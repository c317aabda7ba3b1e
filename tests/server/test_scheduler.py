"""Which pass comes next, as pure logic on a simulated clock."""

from __future__ import annotations

import random

import pytest

from dd_core.plan import few_steps, hybrid, one_step, onestep, skip, teacher
from server.scheduling.jobs import Batch, Job, stages
from server.scheduling.scheduler import SHARES, Scheduler
from tests.server.simulation import DECODE_S, STUDENT_S, TEACHER_S, Simulation, costs, job

ONE, TWO, TEACHER = one_step(16), few_steps(16, 4), teacher(16)
HYBRID, SHORT = hybrid(16, 2, 6), hybrid(16, 0, 4)
PLANS = (ONE, TWO, TEACHER, HYBRID, SHORT)


def scheduler(queue_size: int = 64, limit: int = 8, cohorts: int = 2) -> Scheduler:
    return Scheduler(costs(limit, PLANS), queue_size, cohorts)


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


def test_a_plan_is_cut_into_passes_that_others_can_share() -> None:
    assert [(s.work.kind, s.work.plan, s.passes) for s in stages("tiny", HYBRID)] == [
        ("student", "", 1),
        ("teacher", "pre-trained-3-7", 4),
        ("student", "", 1),
    ]
    assert [(s.work.kind, s.passes) for s in stages("tiny", TEACHER)] == [("teacher", 16), ("decode", 1)]
    assert [s.work.kind for s in stages("tiny", onestep(16))] == ["marginal"]
    assert [s.work.kind for s in stages("tiny", skip(16, 4))] == ["teacher", "marginal"]


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


def test_a_cohort_goes_on_in_step_and_others_wait_for_the_next() -> None:
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
    fifo = Simulation.of([job(j.plan, j.submitted, j.count) for j in background + quick], "fifo").run()
    latest = max(fifo.latency(q) for q in fifo.done if q.plan == ONE)
    assert latest > 10 * max(fair.latency(q) for q in quick), "the baseline is no baseline"


def test_a_teacher_gets_its_share_while_students_never_end() -> None:
    quick = [job(ONE, at=0.004 * k) for k in range(2000)]
    slow = job(TEACHER, at=1.0)
    run = Simulation.of([*quick, slow], limit=1).run()
    work = 16 * TEACHER_S
    assert run.done[slow] < max(run.done[q] for q in quick), "it waited for the last student"
    assert run.latency(slow) <= 1.5 * work / SHARES["heavy"] + STUDENT_S + DECODE_S


def test_who_holds_a_place_that_others_wait_for_gives_it_up_in_time() -> None:
    """Cohorts of low priority fill the device's places; students of a higher one never end."""
    queue = scheduler(limit=1, cohorts=2)
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


def test_a_short_hybrid_overtakes_a_long_teacher() -> None:
    long, short = job(TEACHER), job(SHORT, at=0.0)
    queue = scheduler()
    offered(queue, long)
    finished(queue, taken(queue))
    offered(queue, short)
    assert rest(queue) == [short, long]


def test_no_more_cohorts_than_allowed() -> None:
    queue = scheduler(cohorts=1)
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


def test_a_cohort_that_fails_begins_again_in_halves() -> None:
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
    assert queue.restart() == []
    assert queue.depth == 4 and not queue.dropped
    sizes = []
    while (work := queue.next_batch()) is not None:
        if work.work.kind == "student":
            sizes.append(len(work.samples))
        finished(queue, work)
    assert sizes == [1, 1, 1]
    assert suspects.over and waits.over and queue.backlog.seconds() == 0


def test_a_request_that_kills_the_device_twice_is_the_guilty_one() -> None:
    queue = scheduler()
    bad, good = job(ONE), job(ONE)
    offered(queue, bad, good)
    taken(queue)
    assert queue.restart() == []
    assert [s.job for s in taken(queue).samples] == [bad]
    assert queue.restart() == [bad]
    queue.end(bad)
    assert rest(queue) == [good]


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


@pytest.mark.parametrize("policy", ["fair", "fifo"])
def test_everything_ends_whatever_comes(policy: str) -> None:
    """Random plans, sizes, priorities, deadlines and departures: nothing is lost, nothing stays."""
    draw = random.Random(7)
    queue = Scheduler(costs(8, PLANS), 64, policy=policy)  # type: ignore[arg-type]
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
                for guilty in queue.restart():
                    queue.end(guilty)
                    ended += 1
            elif work is not None:
                done += finished(queue, work, now)
        alive = [a for a in alive if not a.over]
    done += rest(queue)
    assert len(done) + ended == admitted
    assert queue.depth == 0 and queue.jobs == [] and queue.backlog.seconds() == 0
    assert len(set(done)) == len(done)
