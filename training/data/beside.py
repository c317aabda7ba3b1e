"""Captions of the pictures of a folder: from one file, or from a file beside each picture."""

from __future__ import annotations

import json
from pathlib import Path

from dd_core.errors import reason
from training.data.packages import DataError
from training.metrics.reference import picture_files

_FIELDS = ("caption", "text", "prompt")


def pictures_with_captions(folder: Path, file: Path | None = None) -> list[str]:
    """One caption a picture, in the order of the pictures' paths; pictures without one are passed over.

    Args:
        file: JSON, an object of picture name → caption; or lines of `NAME<tab>CAPTION`. None = `PICTURE.txt`,
            or `PICTURE.json` with the field `caption`, `text` or `prompt`, beside each picture.

    Raises:
        DataError: no pictures, a file that cannot be read, or no captions.
    """
    pictures = picture_files(folder)
    if file is not None:
        known = _of_file(file)
        names = ((str(p.relative_to(folder)), p.name, p.stem) for p in pictures)
        found = [next((known[n] for n in each if n in known), "") for each in names]
    else:
        found = [_beside(picture) for picture in pictures]
    captions = [caption.strip() for caption in found if caption.strip()]
    if not captions:
        where = f"in {file}" if file is not None else "beside them (PICTURE.txt or PICTURE.json)"
        raise DataError(f"{folder}: its pictures have no captions {where}", param="captions")
    return captions


def _of_file(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError("not an object of picture name → caption")
            return {str(name): str(caption) for name, caption in content.items()}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {reason(error)}", param="captions") from error
    lines = (line.partition("\t") for line in text.splitlines())
    return {name: caption for name, tab, caption in lines if tab}


def _beside(picture: Path) -> str:
    text, record = picture.with_suffix(".txt"), picture.with_suffix(".json")
    try:
        if text.exists():
            return text.read_text(encoding="utf-8")
        if record.exists():
            content = json.loads(record.read_text(encoding="utf-8"))
            named = content if isinstance(content, dict) else {}
            return next((str(named[field]) for field in _FIELDS if named.get(field)), "")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{picture}: its caption cannot be read ({reason(error)})", param="captions"
        ) from error
    return ""
