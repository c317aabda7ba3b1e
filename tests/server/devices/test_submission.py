"""The pictures of a job as its reader sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from dd_core.plan import one_step
from server.devices.submission import Sampled, Submission
from server.errors import ComputeError
from tests.server.scheduling.simulation import job

PIXELS = np.zeros((1, 1, 3), np.uint8)


class Scene:
    """A submission of a whole job of two images, and how often it was given up."""

    def __init__(self) -> None:
        self.aborted = 0
        self.job = job(one_step(4), count=2)
        self.submission = Submission(self.job, {self.job: 0}, self._abort)

    def _abort(self) -> None:
        self.aborted += 1

    def deliver(self, index: int, *, last: bool = True) -> None:
        self.submission.deliver(self.job, index, PIXELS, last=last)

    async def read(self) -> list[tuple[int, bool]]:
        return [(sampled.index, sampled.last) async for sampled in self.submission]


def run(play: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(play(Scene()))


def test_a_reader_that_is_behind_finds_all_that_came() -> None:
    async def play(scene: Scene) -> None:
        scene.deliver(1)
        scene.deliver(0)
        scene.submission.complete(scene.job)
        assert scene.submission.over
        assert await scene.read() == [(1, True), (0, True)]
        assert await scene.read() == [] and scene.aborted == 0

    run(play)


def test_a_reader_that_waits_is_woken_by_each_picture_and_by_the_end() -> None:
    async def play(scene: Scene) -> None:
        reading = asyncio.ensure_future(anext(scene.submission))
        await asyncio.sleep(0)
        scene.deliver(0)
        assert await reading == Sampled(0, PIXELS, True)
        reading = asyncio.create_task(scene.read())
        await asyncio.sleep(0)
        scene.deliver(1)
        scene.submission.complete(scene.job)
        assert await reading == [(1, True)]

    run(play)


def test_a_preview_that_is_made_again_after_a_death_is_shown_once() -> None:
    async def play(scene: Scene) -> None:
        for _ in range(2):
            scene.deliver(0, last=False)
        scene.deliver(0)
        scene.deliver(1)
        scene.submission.complete(scene.job)
        assert await scene.read() == [(0, False), (0, True), (1, True)]

    run(play)


def test_what_came_before_a_failure_is_read_before_it() -> None:
    """A pass that makes one image well and another not: the stream shows the one and then the error."""

    async def play(scene: Scene) -> None:
        scene.submission.fail(ComputeError("no number"))
        scene.deliver(0)
        assert await anext(scene.submission) == Sampled(0, PIXELS, True)
        with pytest.raises(ComputeError, match="no number"):
            await anext(scene.submission)
        assert scene.aborted == 1

    run(play)


def test_a_reader_whose_client_left_is_canceled_at_once() -> None:
    async def play(scene: Scene) -> None:
        reading = asyncio.create_task(scene.read())
        await asyncio.sleep(0)
        scene.deliver(0)
        scene.submission.cancel()
        scene.submission.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert scene.aborted == 1

    run(play)


def test_canceling_what_is_complete_changes_nothing() -> None:
    async def play(scene: Scene) -> None:
        scene.deliver(0)
        scene.deliver(1)
        scene.submission.complete(scene.job)
        scene.submission.cancel()
        assert len(await scene.read()) == 2 and scene.aborted == 0

    run(play)
