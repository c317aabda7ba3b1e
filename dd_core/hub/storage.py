"""The folder of converted models: where it is, its free space, and the lock of who writes."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dd_core.errors import StorageError


def home_folder() -> Path:
    """`$DD_HOME`, by default `~/.cache/distilled-decoding`: what is kept from run to run."""
    home = os.environ.get("DD_HOME") or Path.home() / ".cache" / "distilled-decoding"
    return Path(home).expanduser()


def models_folder() -> Path:
    """`models` in `home_folder`: the converted models."""
    return home_folder() / "models"


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuses before anything is written.

    Args:
        folder: where it would be written; it need not exist yet.
        needed: bytes.

    Raises:
        StorageError: fewer bytes are free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"{what} needs {gigabytes(needed)} in {folder}, where {gigabytes(free)} are free", param="disk"
        )


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Waits until no other process is in the same block, by a lock file that stays."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # slow to import

    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        yield


@contextmanager
def room_errors(folder: Path, what: str) -> Iterator[None]:
    """Turns "the disk is full", however a library says it, into a StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # in safetensors' words
        code = error.errno if isinstance(error, OSError) else int(number[1]) if number else None
        if code not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"the disk of {folder} became full during {what}; free some room there", param="disk"
        ) from error


def gigabytes(size: int) -> str:
    """A size as people read it: 1.24 GB, 3 MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"
