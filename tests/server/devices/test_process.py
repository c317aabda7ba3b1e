"""The scheduler's passes on a real device, without a server between them."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dd_core import plan
from dd_core.bundle import Bundle
from dd_core.engine import arithmetic
from dd_core.engine.runner import Runner
from dd_core.errors import InvalidRequestError
from dd_core.noise import NoiseKey
from dd_core.plan import Plan
from dd_core.sampling import sample_images
from server.devices import process
from server.devices.messages import (
    DeviceOptions,
    Done,
    Failed,
    Foresee,
    Forward,
    Load,
    Loaded,
    Pixels,
    Unload,
)
from server.devices.process import Device, serve
from server.devices.worker import command_of
from server.scheduling.costs import CostTable
from server.scheduling.jobs import Job
from server.scheduling.scheduler import Scheduler
from tests.server.helpers import PATIENCE

T = 64


@pytest.fixture
def device(bundle_folder: Path) -> Device:
    found = Device(torch.device("cpu"), DeviceOptions("cpu"))
    made = found.load(Load("tiny", bundle_folder))
    found.keep("tiny", made, found.runner_of(made))
    return found


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["auto", "exact32", "bf16"])
def test_models_are_loaded_in_the_chosen_arithmetic(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, exact: bool
) -> None:
    """`auto` is float32 where bytes are promised, and where the hardware has no bfloat16."""
    low = {True: name == "bf16", False: name != "exact32"}[exact]
    options = DeviceOptions("cpu", exact=exact, arithmetic=name)
    monkeypatch.setattr(arithmetic, "native_bfloat16", lambda _: True)
    sampler = Device(torch.device("cpu"), options).load(Load("tiny", bundle_folder)).sampler
    assert sampler.teacher is not None and sampler.exact == exact
    assert sampler.teacher.new_cache(1).keys.dtype == (torch.bfloat16 if low else torch.float32)
    monkeypatch.setattr(arithmetic, "native_bfloat16", lambda _: False)
    device = Device(torch.device("cpu"), options)
    if name == "bf16":
        with pytest.raises(InvalidRequestError, match="arithmetic bf16 is not in the hardware of this cpu"):
            device.load(Load("tiny", bundle_folder))
    else:
        sampler = device.load(Load("tiny", bundle_folder)).sampler
        assert sampler.teacher is not None
        assert sampler.teacher.new_cache(1).keys.dtype == torch.float32


def run(
    device: Device, scheduler: Scheduler, leaving: Job | None = None, after: int = 0
) -> dict[int, Pixels]:
    """All passes; before pass number `after` the client of `leaving` goes. Gives the pictures by number."""
    pictures: dict[int, Pixels] = {}
    for number in range(1000):
        if leaving is not None and number == after:
            scheduler.end(leaving)
        device.forget(scheduler.dropped)
        scheduler.dropped.clear()
        work = scheduler.next_batch()
        if work is None:
            break
        done = device.forward(command_of(work))
        pictures |= done.pictures
        scheduler.finish(work, done.seconds, done.decode_seconds, 1.0)
    return pictures


@pytest.mark.parametrize("after", [1, 7, 11, 12, 70])
@pytest.mark.parametrize("chosen", [plan.hybrid(T, 10, 20), plan.hybrid(T, 0, 20), plan.teacher(T)])
def test_who_leaves_a_teacher_batch_disturbs_nobody_and_leaves_nothing_behind(
    device: Device, bundle: Bundle, chosen: Plan, after: int
) -> None:
    """Once the batch went down with the image that was forgotten, or the image came back for good."""
    scheduler = Scheduler(CostTable((1, 2, 4)), 64)
    leaves, stays = (Job("tiny", chosen, label, NoiseKey.of_seed(label, 1), 0.0) for label in (1, 2))
    for job in (leaves, stays):
        assert scheduler.admit(job, 0.0) is None
    pictures = run(device, scheduler, leaves, after)
    assert stays.over and not stays.unfinished
    expected = sample_images(bundle.sampler, chosen, [2], [(2, 0)])[0].numpy()
    assert np.array_equal(pictures[stays.samples[0].number], expected)
    assert device.held == set()


def test_a_teacher_batch_that_all_have_left_is_forgotten(device: Device) -> None:
    scheduler = Scheduler(CostTable((1, 2, 4)), 64)
    job = Job("tiny", plan.teacher(T), 1, NoiseKey.of_seed(1, 2), 0.0)
    assert scheduler.admit(job, 0.0) is None
    assert run(device, scheduler, job, 5) == {}
    assert device.held == set()


def test_an_image_is_told_once(device: Device) -> None:
    """A teacher's later passes do not say again what its images follow from."""
    scheduler = Scheduler(CostTable((1, 2, 4)), 64)
    scheduler.admit(Job("tiny", plan.teacher(T), 1, NoiseKey.of_seed(1, 2), 0.0), 0.0)
    told = []
    while (work := scheduler.next_batch()) is not None:
        told.append(len(command_of(work).new))
        done = device.forward(command_of(work))
        scheduler.finish(work, done.seconds, done.decode_seconds, 1.0)
    assert sum(told) == told[0] == 2


def test_a_load_that_ends_after_its_unload_is_neither_kept_nor_answered(bundle_folder: Path) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def prepare(bundle: Bundle) -> Bundle:
        if not loading.is_set():  # the first load alone waits
            loading.set()
            assert go_on.wait(PATIENCE)
        return bundle

    device = Device(torch.device("cpu"), DeviceOptions("cpu", prepare=prepare))
    ours, theirs = multiprocessing.Pipe()
    with ThreadPoolExecutor(1) as pool, ours:
        serving = pool.submit(serve, theirs, device)
        ours.send(Load("tiny", bundle_folder, 1))
        assert loading.wait(PATIENCE)
        before = set(threading.enumerate())
        ours.send(Unload("tiny"))
        ours.send(Load("tiny", bundle_folder, 2))
        assert ours.poll(PATIENCE) and ours.recv() == Loaded(
            Load("tiny", bundle_folder, 2), None, platform.machine()
        )
        kept = device.bundles["tiny"]
        go_on.set()
        for thread in before - {threading.current_thread(), threading.main_thread()}:
            if "(load)" in thread.name:
                thread.join(PATIENCE)
        assert device.bundles["tiny"] is kept and not ours.poll()
        ours.close()
        with pytest.raises(EOFError):
            serving.result()


class _Gone(Exception):  # noqa: N818 - the end of a process that is none
    pass


@pytest.mark.parametrize("lost", [True, False])
def test_an_error_of_the_gpu_that_stays_ends_the_process(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """A device whose every call fails once answered every request with an error, for good."""

    def synchronise(_: torch.device) -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def end(code: int) -> None:
        raise _Gone(code)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronise)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(os, "_exit", end)
    device = Device(torch.device("cuda", 1), DeviceOptions("cuda:1"))
    ours, theirs = multiprocessing.Pipe()
    ours.send(Forward("unknown", "student", (1,), (0,), 1))
    ours.close() if lost else None
    with ThreadPoolExecutor(1) as pool, theirs:
        serving = pool.submit(serve, theirs, device)
        if lost:
            with pytest.raises(_Gone, match="1"):
                serving.result()
        else:
            assert isinstance(ours.recv(), Failed)
            ours.close()
            with pytest.raises(EOFError):
                serving.result()


def test_a_thread_computes_on_its_own_gpu(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is a thread's own: a model that a thread loaded went to the first GPU."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(process, "load_bundle", lambda *_: chosen.append(torch.device("cpu")))
    device = Device(torch.device("cuda", 1), DeviceOptions("cuda:1"))
    with pytest.raises(AttributeError):  # what was loaded is no bundle
        device.load(Load("tiny", bundle_folder))
    assert chosen == [torch.device("cuda", 1), torch.device("cpu")]
    assert not torch.backends.cudnn.allow_tf32, "float32 is float32"
    assert not device.loading.locked()


def test_a_gpu_records_nothing_while_a_model_loads(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, held = Device(torch.device("cuda", 0), DeviceOptions("cuda:0")), []
    monkeypatch.setattr(process, "settle", lambda _: None)
    monkeypatch.setattr(process, "load_bundle", lambda *_: held.append(device.loading.locked()))
    with pytest.raises(AttributeError):
        device.load(Load("tiny", bundle_folder))
    assert held == [True]


class _Waiting:
    """A runner whose pass waits until it is told of more images."""

    held: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[tuple[NoiseKey, ...]] = queue.SimpleQueue()

    def foresee(self, keys: tuple[NoiseKey, ...]) -> None:
        self.told.put(keys)

    def advance(self, *_: object) -> None:
        assert self.told.get(timeout=PATIENCE) == NoiseKey.of_seed(8, 2)

    def drop(self, numbers: tuple[int, ...]) -> None:
        assert not numbers

    def recover(self, _: int | None) -> None:
        pass


def test_a_gpu_hears_of_images_to_come_while_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is waited for once a pass, at the end."""
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(process, "mark", lambda _: time.perf_counter())
    device = Device(torch.device("cuda", 0), DeviceOptions("cuda:0"), _read=math.inf)
    device.runners["tiny"] = _Waiting()  # type: ignore[assignment]
    ours, theirs = multiprocessing.Pipe()
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve, theirs, device)
        ours.send(Forward("tiny", "student", (1,), (0,), 1))
        ours.send(Foresee("unloaded", NoiseKey.of_seed(7, 2)))
        ours.send(Foresee("tiny", NoiseKey.of_seed(8, 2)))
        assert ours.poll(PATIENCE)
        assert isinstance(ours.recv(), Done)
        assert waits == [device.device]
        ours.close()
        with pytest.raises(EOFError):
            serving.result()


def test_a_model_whose_runner_cannot_be_made_is_answered(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a GPU has no memory left for its images: the load would have been waited for in vain."""

    def fail(_: Device, __: Bundle) -> Runner:
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(Device, "runner_of", fail)
    ours, theirs = multiprocessing.Pipe()
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve, theirs, Device(torch.device("cpu"), DeviceOptions("cpu")))
        ours.send(Load("tiny", bundle_folder))
        assert ours.poll(PATIENCE)
        answer = ours.recv()
        assert answer.error.message == "tiny: OutOfMemoryError while loading"
        ours.close()
        with pytest.raises(EOFError):
            serving.result()
