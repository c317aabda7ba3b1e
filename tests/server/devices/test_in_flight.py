"""A device that is sent its next pass when it is about to want it."""

from __future__ import annotations

import asyncio

import pytest

from dd_core.plan import one_step
from server.devices import in_flight
from server.devices.in_flight import LEAD, InFlight
from server.devices.messages import Done, Forward
from server.devices.submission import Submission
from server.devices.worker import DeviceWorker
from server.scheduling.jobs import Batch, Job
from tests.server.clock import Clock
from tests.server.devices.test_worker import Process, worker_of
from tests.server.scheduling.helpers import ONE, offered, scheduler, taken
from tests.server.scheduling.simulation import DECODE_S, STUDENT_S, job


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(now=0.0)
    monkeypatch.setattr(in_flight, "time", clock)
    return clock


def some_batch() -> Batch:
    queue = scheduler()
    offered(queue, job(ONE))
    return taken(queue)


def test_the_next_pass_is_wanted_shortly_before_the_end_of_the_first(clock: Clock) -> None:
    passes = InFlight(ahead=True)
    assert passes.until_next == 0.0 and passes.left == 0.0
    first, second = some_batch(), some_batch()
    passes.add(0.050, first)
    assert passes.until_next == pytest.approx(0.050 - LEAD)
    clock.now = 0.049
    assert passes.until_next == 0.0 and passes.left == pytest.approx(0.001)
    passes.add(0.030, second)
    assert passes.until_next is None, "two are enough"
    clock.now = 0.051
    assert passes.end() == (first, pytest.approx(0.051))
    assert passes.left == pytest.approx(0.030), "the device came to it just now"
    clock.now = 0.091
    assert passes.end() == (second, pytest.approx(0.040)) and not passes


def test_a_pass_that_is_late_says_nothing_of_its_end(clock: Clock) -> None:
    passes = InFlight(ahead=True)
    passes.add(0.050, some_batch())
    clock.now = 0.050 + 0.9 * LEAD
    assert passes.until_next == 0.0
    clock.now = 0.050 + 1.1 * LEAD
    assert passes.until_next is None and passes.left == 0.0


def test_of_a_pass_that_was_never_measured_nobody_knows_the_end(clock: Clock) -> None:
    passes = InFlight(ahead=True)
    passes.add(0.0, some_batch())
    assert passes.until_next is None


def test_half_of_a_short_pass_is_waited_for(clock: Clock) -> None:
    passes = InFlight(ahead=True)
    passes.add(LEAD, some_batch())
    assert passes.until_next == pytest.approx(LEAD / 2)
    clock.now = 0.6 * LEAD
    assert passes.until_next == 0.0
    clock.now = 1.6 * LEAD
    assert passes.until_next is None


def test_other_devices_and_passes_of_the_warm_up_are_waited_for(clock: Clock) -> None:
    on_cpu, warming_up = InFlight(ahead=False), InFlight(ahead=True)
    on_cpu.add(0.001, some_batch())
    assert on_cpu.until_next is None

    async def scene() -> None:
        warming_up.add(0.001, asyncio.get_running_loop().create_future())
        assert warming_up.until_next is None

    asyncio.run(scene())


def on_gpu() -> tuple[DeviceWorker, Process]:
    worker = worker_of("cuda:0")
    worker.supervisor = process = Process(worker)  # type: ignore[assignment]
    return worker, process


def always_about_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass is always about to end."""
    monkeypatch.setattr(InFlight, "until_next", property(lambda self: None if len(self) > 1 else 0.0))


def submitted(worker: DeviceWorker, count: int = 1) -> Job:
    asked = job(one_step(4), count=count)
    worker.submit(asked, Submission(asked, dict.fromkeys([asked], 0), lambda: None))
    return asked


def passes(process: Process) -> list[tuple[int, ...]]:
    return [command.numbers for command in process.sent if isinstance(command, Forward)]


def test_a_gpu_has_two_passes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    always_about_to_end(monkeypatch)

    async def scene() -> None:
        worker, process = on_gpu()
        jobs = [submitted(worker), submitted(worker), submitted(worker)]
        assert passes(process) == [(1,), (2,)] and worker.depth == 1
        worker._on_answer(Done(0.01, 0.0, {}))
        assert [each.over for each in jobs] == [True, False, False]
        assert passes(process) == [(1,), (2,), (3,)] and worker.depth == 0
        worker._on_answer(Done(0.01, 0.0, {}))
        worker._on_answer(Done(0.01, 0.0, {}))
        assert all(each.over for each in jobs) and worker.scheduler.backlog.seconds() == 0

    asyncio.run(scene())


def test_what_arrives_during_a_pass_is_in_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formed at the end, not when there was something to form it of."""
    monkeypatch.setattr(in_flight, "LEAD", (STUDENT_S + DECODE_S) / 2)

    async def scene() -> None:
        worker, process = on_gpu()
        submitted(worker)
        submitted(worker)
        submitted(worker)
        assert passes(process) == [(1,)]
        while len(passes(process)) < 2:
            await asyncio.sleep(0.001)
        assert passes(process) == [(1,), (2, 3)]

    asyncio.run(scene())


def test_a_crash_is_counted_against_the_pass_that_the_device_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    always_about_to_end(monkeypatch)

    async def scene() -> None:
        worker, process = on_gpu()
        first, second = submitted(worker), submitted(worker)
        process.up = False
        worker._on_lost(True)
        assert (first.crashes, second.crashes) == (1, 0) and worker.depth == 2
        process.up = True
        worker._on_restored(0.1)
        assert sorted(passes(process)[2:]) == [(1,), (2,)]

    asyncio.run(scene())


def test_the_warm_up_has_the_device_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    always_about_to_end(monkeypatch)

    async def scene() -> None:
        worker, process = on_gpu()
        submitted(worker)
        measured = asyncio.create_task(worker.run(Forward("any", "student", (-1,), (0,), 1)))
        await asyncio.sleep(0)
        submitted(worker)
        assert passes(process) == [(1,)]
        worker._on_answer(Done(0.01, 0.0, {}))
        assert passes(process) == [(1,), (-1,)]
        worker._on_answer(Done(0.01, 0.0, {}))
        assert await measured == Done(0.01, 0.0, {})
        assert passes(process) == [(1,), (-1,), (2,)]

    asyncio.run(scene())
