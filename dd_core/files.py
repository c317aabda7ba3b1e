"""Files that are written whole or not at all, that other users may read as far as the umask lets them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes the place of `path` at the end of the block.

    The name is nobody else's: jobs in containers have one process number, so that would not do. The file gets
    the mode of any new file; safetensors would make it its owner's alone.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError, SafetensorError: the file cannot be written; what was there before stays.
    """
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, dict(metadata) if metadata else None)


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata that `save_tensors` wrote; none where there is no such file.

    Raises:
        SafetensorError: it is another kind of file.
    """
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
