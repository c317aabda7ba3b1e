"""The lock of a run folder: one command works in it at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dd_core.errors import RecipeError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which must exist, within the block. A process that dies lets go of it.

    Raises:
        RecipeError: another process holds it; the message has its number.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RecipeError(
                f"{folder} is in use by process {file.read().strip()}; wait for its end, or choose another "
                "--out",
                param="out",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
