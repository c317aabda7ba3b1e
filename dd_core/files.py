"""Safetensors files, written whole or not at all, that other users may read as far as the umask lets them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `path` with the mode of any new file; safetensors itself makes files for their owner alone.

    Raises:
        OSError, SafetensorError: the file cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        save_file(dict(tensors), temporary, dict(metadata) if metadata else None)
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
