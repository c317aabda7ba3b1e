"""The baseline of the interference benchmark: first come, first served."""

from __future__ import annotations

from benchmarks.fifo_server import FifoScheduler
from server.scheduling.scheduler import Scheduler
from tests.server.scheduling.helpers import ONE, TEACHER
from tests.server.scheduling.simulation import Simulation, job


def test_a_one_step_request_waits_for_the_teachers_before_it() -> None:
    latest = {}
    for kind in (Scheduler, FifoScheduler):
        background = [job(TEACHER, at=0.002 * k, count=4) for k in range(40)]
        quick = [job(ONE, at=0.05 + 0.1 * k) for k in range(20)]
        run = Simulation.of(background + quick, kind).run()
        assert len(run.done) == 60
        latest[kind] = max(run.latency(q) for q in quick)
    assert latest[FifoScheduler] > 10 * latest[Scheduler], "the baseline is no baseline"


def test_requests_end_in_the_order_in_which_they_came() -> None:
    first, second = job(TEACHER), job(TEACHER, at=0.02)
    between, last = job(ONE, at=0.01), job(ONE, at=0.03)
    run = Simulation.of([first, second, between, last], FifoScheduler, limit=1).run()
    assert list(run.done) == [first, between, second, last]
