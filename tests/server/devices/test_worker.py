"""The queue of a device whose process is made up here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from dd_core.plan import one_step
from server import errors
from server.devices.messages import Command, DeviceOptions, Done, Drop, Foresee, Forward
from server.devices.submission import Submission
from server.devices.worker import DeviceWorker
from server.observability.metrics import Metrics
from server.scheduling.scheduler import Scheduler
from tests.server.scheduling.simulation import costs, job


@dataclass
class Process:
    """In place of a `Supervisor`; it dies of the first message of a kind."""

    worker: DeviceWorker
    deadly: type[Command] | None = None
    up: bool = True
    sent: list[Command] = field(default_factory=list)
    watched: list[bool] = field(default_factory=list)  # of each pass

    def send(self, command: Command) -> None:
        if isinstance(command, self.deadly or ()):
            self.up, self.deadly = False, None
            self.worker._on_lost(True)
        elif self.up:
            self.sent.append(command)

    def forward(self, command: Command, watched: bool = True) -> None:
        self.watched.append(watched)
        self.send(command)


def worker_of(device: str) -> DeviceWorker:
    return DeviceWorker(
        device,
        DeviceOptions(device),
        Scheduler(costs(), 64),
        Metrics(),
        hang_timeout=1.0,
        on_change=lambda: None,
        on_failure=lambda _: None,
    )


@pytest.fixture
def worker() -> DeviceWorker:
    return worker_of("cpu")


@pytest.mark.parametrize("deadly", [Drop, Forward])
def test_a_process_that_is_found_dead_by_a_message_gets_its_work_later(
    worker: DeviceWorker, deadly: type[Command]
) -> None:
    """Once a pass was taken for sent that no process had got, and the queue stood still until it hung."""

    async def scene() -> None:
        worker.supervisor = process = Process(worker, deadly)
        worker.scheduler.dropped.append(7)
        asked = job(one_step(4))
        worker.submit(asked, Submission(asked, {asked: 0}, lambda: None))
        assert not process.up and process.sent in ([], [Drop((7,))])
        process.up = True
        worker._on_restored(0.1)
        assert isinstance(process.sent[-1], Forward)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("crashed", "deaths", "error", "says"),
    [
        (True, 2, errors.ComputeError, "twice"),
        (False, 3, errors.DeviceKilledError, "from outside 3 times"),
    ],
)
def test_a_request_that_the_device_died_on_too_often_fails_with_what_is_known(
    worker: DeviceWorker, crashed: bool, deaths: int, error: type[errors.ApiError], says: str
) -> None:
    async def scene() -> None:
        worker.supervisor = process = Process(worker)
        asked = job(one_step(4))
        submission = Submission(asked, {asked: 0}, lambda: None)
        worker.submit(asked, submission)
        for turn in range(deaths):
            assert isinstance(process.sent[-1], Forward) and not submission.over, f"after {turn} deaths"
            process.up = False
            worker._on_lost(crashed)
            process.up = True
            worker._on_restored(0.1)
        with pytest.raises(error, match=says):
            await anext(submission)

    asyncio.run(scene())


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_only_a_gpu_may_take_its_time_for_the_warm_up(worker: DeviceWorker, device: str) -> None:
    """A first pass that had to choose its kernels was taken for hung; those of requests are all watched."""

    async def scene() -> None:
        worker.options = DeviceOptions(device)
        worker.supervisor = process = Process(worker)
        running = asyncio.create_task(worker.run(Forward("any", "student", (-1,), (0,), 1)))
        await asyncio.sleep(0)
        worker._on_answer(Done(0.1, 0.0, {}))
        await running
        asked = job(one_step(4))
        worker.submit(asked, Submission(asked, {asked: 0}, lambda: None))
        assert process.watched == [device == "cpu", True]

    asyncio.run(scene())


@pytest.mark.parametrize(("device", "busy"), [("cpu", True), ("cuda:1", False), ("cuda:1", True)])
def test_a_busy_gpu_is_told_of_images_to_come(worker: DeviceWorker, device: str, busy: bool) -> None:
    """Of the others' noise nothing can be made meanwhile."""

    async def scene() -> None:
        worker.options = DeviceOptions(device)
        worker.supervisor = process = Process(worker)
        first, second = job(one_step(4)), job(one_step(4), count=2)
        for asked in (first, second) if busy else (second,):
            worker.submit(asked, Submission(asked, {asked: 0}, lambda: None))
        told = [command for command in process.sent if isinstance(command, Foresee)]
        assert told == ([Foresee(second.model, second.keys)] if busy and device != "cpu" else [])

    asyncio.run(scene())
