"""Pixels in memory of two processes: what is put is what arrives; what does not fit goes the other way."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

import numpy as np
import pytest

from server.devices import pixels
from server.devices.pixels import PixelBuffer, Pixels


def _pictures(numbers: tuple[int, ...], side: int = 8) -> dict[int, Pixels]:
    random = np.random.default_rng(sum(numbers))
    return {number: random.integers(0, 255, (side, side, 3), np.uint8) for number in numbers}


def _put(connection: Connection, buffer: PixelBuffer) -> None:
    """The device process: puts what it is told, until nothing more comes."""
    while numbers := connection.recv():
        connection.send(buffer.put(_pictures(numbers)))


def test_what_another_process_puts_is_taken_here() -> None:
    """Copies: the next pass does not change a picture that is still to be encoded."""
    buffer = PixelBuffer.new()
    assert buffer is not None
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=_put, args=(theirs, buffer))
    process.start()
    taken = []
    for numbers in ((3, 1, 2), (5,)):
        ours.send(numbers)
        placed = ours.recv()
        assert placed == (numbers, (8, 8, 3))
        taken.append((numbers, buffer.take(placed)))
    ours.send(())
    process.join()
    for numbers, found in taken:
        assert list(found) == list(numbers)
        for number, picture in _pictures(numbers).items():
            assert np.array_equal(found[number], picture)
    buffer.close()


def test_pictures_of_two_passes_may_lie_there_at_once() -> None:
    """And of a third, once those of the first are taken."""
    buffer = PixelBuffer.new()
    assert buffer is not None
    passes = [_pictures((1, 2)), _pictures((3,)), _pictures((4, 5), side=4)]
    first, second = buffer.put(passes[0]), buffer.put(passes[1])
    assert first is not None and second is not None
    found = [buffer.take(first)]
    third = buffer.put(passes[2])
    assert third is not None
    found += [buffer.take(second), buffer.take(third)]
    for pictures, taken in zip(passes, found, strict=True):
        assert list(pictures) == list(taken)
        assert all(np.array_equal(picture, taken[number]) for number, picture in pictures.items())
    buffer.close()


def test_pictures_that_do_not_fit_stay_in_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "_BYTES", 8 * 8 * 3)
    buffer = PixelBuffer.new()
    assert buffer is not None
    assert buffer.put(_pictures((1, 2))) is None and buffer.put({}) is None
    assert buffer.put(_pictures((1,))) == ((1,), (8, 8, 3))


def test_a_system_without_nameless_files_has_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert PixelBuffer.new() is None
