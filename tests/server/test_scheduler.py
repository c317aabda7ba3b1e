"""The queue as pure logic: no threads, no model, no clock."""

from __future__ import annotations

from dd_core.plan import Plan, few_steps, one_step, teacher
from server.scheduler import Job, Scheduler, WorkMeter

ONE, TWO, TEACHER = one_step(16), few_steps(16, 4), teacher(16)


def job(plan: Plan, count: int = 1, seed: int = 0, at: float = 0.0) -> Job:
    return Job(("tiny", plan), 3, seed, count, at)


def test_waiting_images_of_one_plan_share_a_batch_in_order_of_arrival() -> None:
    scheduler = Scheduler(max_batch=8, queue_size=64)
    first, other, second = job(ONE, 2), job(TEACHER), job(ONE, 3)
    for each in (first, other, second):
        assert scheduler.offer(each)
    batch = scheduler.take()
    assert batch is not None
    assert batch.key == ("tiny", ONE)
    assert batch.items == [(first, 0), (first, 1), (second, 0), (second, 1), (second, 2)]
    following = scheduler.take()
    assert following is not None
    assert following.items == [(other, 0)]
    assert scheduler.take() is None


def test_the_longest_waiting_job_chooses_the_plan_so_none_starves() -> None:
    scheduler = Scheduler(max_batch=2, queue_size=64)
    slow = job(TEACHER)
    scheduler.offer(job(ONE, 2))
    scheduler.offer(slow)
    for _ in range(4):
        scheduler.offer(job(ONE, 2))
    scheduler.take()
    batch = scheduler.take()
    assert batch is not None
    assert batch.jobs == [slow]


def test_a_job_beyond_the_batch_limit_is_cut_and_completes_once() -> None:
    scheduler = Scheduler(max_batch=4, queue_size=64)
    large = job(ONE, 10)
    scheduler.offer(large)
    sizes, complete, now = [], [], 0.0
    while (batch := scheduler.take()) is not None:
        now += 0.5
        sizes.append([index for _, index in batch.items])
        complete.append(scheduler.finish(batch, 0.25, now))
    assert sizes == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert complete == [[], [], [large]]
    assert large.compute_s == 0.75
    assert large.queue_s == 0.75


def test_the_bound_counts_images_and_refuses_a_job_as_a_whole() -> None:
    scheduler = Scheduler(max_batch=4, queue_size=5)
    assert scheduler.offer(job(ONE, 3))
    assert not scheduler.offer(job(ONE, 3))
    assert scheduler.depth == 3
    assert scheduler.offer(job(ONE, 2))
    scheduler.take()
    assert scheduler.depth == 1
    assert scheduler.offer(job(ONE, 4))


def test_a_canceled_job_is_never_computed_and_frees_its_room() -> None:
    scheduler = Scheduler(max_batch=4, queue_size=4)
    gone, stays = job(ONE, 3), job(ONE, 1)
    scheduler.offer(gone)
    scheduler.offer(stays)
    scheduler.cancel(gone)
    assert scheduler.depth == 1
    batch = scheduler.take()
    assert batch is not None
    assert batch.jobs == [stays]


def test_a_job_canceled_while_it_runs_is_not_reported_complete_and_its_rest_is_dropped() -> None:
    scheduler = Scheduler(max_batch=2, queue_size=8)
    gone = job(ONE, 4)
    scheduler.offer(gone)
    batch = scheduler.take()
    assert batch is not None
    scheduler.cancel(gone)
    assert scheduler.finish(batch, 0.1, 1.0) == []
    assert scheduler.depth == 0
    assert scheduler.take() is None


def test_retry_after_follows_measured_work() -> None:
    scheduler = Scheduler(max_batch=4, queue_size=4)
    scheduler.meter.observe(("tiny", TEACHER), 1, 3.0)
    scheduler.offer(job(TEACHER, 4))
    assert scheduler.retry_after(1) == 3
    assert scheduler.retry_after(4) == 12
    assert scheduler.retry_after(1, busy=5.5) == 9
    quick = Scheduler(max_batch=4, queue_size=4)
    quick.meter.observe(("tiny", ONE), 4, 0.004)
    quick.offer(job(ONE, 4))
    assert quick.retry_after(4) == 1


def test_the_meter_forgets_an_outlier_and_scales_for_plans_that_never_ran() -> None:
    meter = WorkMeter()
    assert meter.estimate(("tiny", ONE), 5) == 0.0
    meter.observe(("tiny", ONE), 1, 10.0)
    for _ in range(30):
        meter.observe(("tiny", ONE), 2, 0.02)
    assert 0.009 < meter.estimate(("tiny", ONE), 1) < 0.02
    assert meter.estimate(("tiny", TWO), 1) == 2 * meter.estimate(("tiny", ONE), 1)
