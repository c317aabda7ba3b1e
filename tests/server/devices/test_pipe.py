"""A pipe whose other end stops, dawdles or goes away: the event loop never waits for it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from server.devices.pipe import MessagePipe

Scene = Callable[[MessagePipe, Connection, list[Any], list[bool]], Awaitable[None]]


def play(scene: Scene) -> None:
    """Open a pipe and run `scene` with it, its other end, what came and whether it was closed."""

    async def run() -> None:
        ours, theirs = multiprocessing.Pipe()
        came: list[Any] = []
        closed: list[bool] = []
        pipe = await MessagePipe.open(ours, came.append, lambda: closed.append(True))
        try:
            async with asyncio.timeout(30):
                await scene(pipe, theirs, came, closed)
        finally:
            pipe.close()
            theirs.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_messages_come_whole_and_in_order() -> None:
    sent = [1, "two", b"3" * 1_000_000, None, {"five": [5]}]

    async def scene(pipe: MessagePipe, theirs: Connection, came: list[Any], closed: list[bool]) -> None:
        await asyncio.to_thread(lambda: [theirs.send(message) for message in sent])
        await until(lambda: len(came) == len(sent))
        assert came == sent and not closed

    play(scene)


@pytest.mark.parametrize("seed", range(5))
def test_a_message_that_comes_in_pieces_holds_nobody_up(seed: int) -> None:
    """Once the loop waited for the rest of a message whose sender had stopped in the middle of it."""
    draw = random.Random(seed)
    body = bytes(ForkingPickler.dumps(b"x" * 5000))
    raw = (len(body).to_bytes(4, "big") + body) * 3

    async def scene(pipe: MessagePipe, theirs: Connection, came: list[Any], closed: list[bool]) -> None:
        cuts = sorted(draw.sample(range(1, len(raw)), 20))
        for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            os.write(theirs.fileno(), raw[start:stop])
            began = time.monotonic()
            await asyncio.sleep(0.001)
            assert time.monotonic() - began < 1.0
        await until(lambda: len(came) == 3)
        assert came == [b"x" * 5000] * 3

    play(scene)


def test_sending_does_not_wait_for_an_end_that_does_not_read() -> None:
    async def scene(pipe: MessagePipe, theirs: Connection, came: list[Any], closed: list[bool]) -> None:
        began = time.monotonic()
        for number in range(20):
            pipe.send((number, bytes(1_000_000)))
        assert time.monotonic() - began < 10.0
        read = await asyncio.to_thread(lambda: [theirs.recv()[0] for _ in range(20)])
        assert read == list(range(20))

    play(scene)


def test_an_end_that_closes_is_noticed_once_and_a_half_message_is_none() -> None:
    async def scene(pipe: MessagePipe, theirs: Connection, came: list[Any], closed: list[bool]) -> None:
        os.write(theirs.fileno(), (100).to_bytes(4, "big") + b"half")
        theirs.close()
        await until(lambda: bool(closed))
        pipe.send("nobody reads this")
        await asyncio.sleep(0.01)
        assert came == [] and closed == [True]

    play(scene)


def test_who_closes_it_hears_nothing_more() -> None:
    async def scene(pipe: MessagePipe, theirs: Connection, came: list[Any], closed: list[bool]) -> None:
        theirs.send("late")
        pipe.close()
        await asyncio.sleep(0.01)
        assert came == [] and closed == []

    play(scene)


def test_what_was_said_before_the_end_is_heard_though_sending_finds_it() -> None:
    """Once an answer was lost so, and its pass took the blame for a death in the next one."""

    async def scene(pipe: MessagePipe, theirs: Connection, came: list[Any], closed: list[bool]) -> None:
        theirs.send("an answer")
        theirs.close()
        pipe.send("a question")  # before the loop has read anything
        await until(lambda: bool(closed))
        assert came == ["an answer"] and closed == [True]

    play(scene)
