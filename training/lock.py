"""The lock of a run folder: one command works in it at a time, or jobs that make its pairs together."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dd_core.errors import RecipeError

_PATIENCE = 5.0  # seconds that a job waits for another one that is just beginning


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which must exist, within the block. A process that dies lets go of it.

    Raises:
        RecipeError: other processes hold it; the message has their numbers.
    """
    with (folder / ".lock").open("a+") as file:
        if not _held(file, fcntl.LOCK_EX):
            raise _in_use(folder, file)
        file.truncate(0)
        _sign(file)
        yield


@contextmanager
def shared(folder: Path, begin: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Hold a folder together with others that share it; nobody can have it for himself meanwhile.

    Args:
        begin: called where no other process holds the folder, before one can.

    Yields:
        a function for the end of the block: True if this process is the last one, and holds it alone now.

    Raises:
        RecipeError: another process holds it for itself.
    """
    with (folder / ".lock").open("a+") as file:
        until = time.monotonic() + _PATIENCE
        if _held(file, fcntl.LOCK_EX):
            file.truncate(0)
            begin()
        # Even where it was held: between the two kinds the kernel may give it to another one that begins.
        while not _held(file, fcntl.LOCK_SH):
            if time.monotonic() > until:
                raise _in_use(folder, file)
            time.sleep(0.02)
        _sign(file)
        yield lambda: _held(file, fcntl.LOCK_EX)


def _held(file: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(file: TextIO) -> None:
    file.write(f"{os.getpid()}\n")
    file.flush()


def _in_use(folder: Path, file: TextIO) -> RecipeError:
    file.seek(0)
    numbers = file.read().split()
    who = f"one of the processes {', '.join(numbers)}" if len(numbers) > 1 else f"process {''.join(numbers)}"
    return RecipeError(f"{folder} is in use by {who}; wait for its end, or choose another --out", param="out")
