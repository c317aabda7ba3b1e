"""Images of a folder with one sub-folder a class: decoded once, a tenth of each class held out.

    photos/cat/1.jpg ─▶ centre crop ─▶ resize ─▶ $DD_CACHE/folders/KEY: train.u8, test.u8, index.safetensors

KEY is of the folder's path and the size; a file whose name, length or time has changed has all of it made
anew. Rows lie in the order of the hashes of their files' bytes: so classes are mixed, the split hangs on
nothing but the pictures, and copies of a picture lie side by side.

Shapes: N images, S pixels a side; images are `[N, 3, S, S]` uint8, memory-mapped.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.progress import track
from safetensors import safe_open
from torch import Tensor

from dd_core.files import save_tensors
from dd_core.hub.storage import check_room, exclusive
from training.data.images import SUFFIXES, UNREADABLE, ImageSet
from training.data.packages import DataError, cache_dir

log = logging.getLogger("dd_train")

HELD_OUT, LEAST_HELD_OUT = 0.1, 20
_VERSION = 1  # raise it when pixels or the split change, so that no old cache is taken
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}
_CHUNK = 256


@dataclass(frozen=True)
class FolderImages:
    """A folder's images, those to learn from and those held out.

    Args:
        classes: names of the sub-folders in natural order ("2" before "10"); a label is a place among them.
        digest: a hash over the classes and every image that could be read, with its label.
    """

    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    digest: str


class _File(NamedTuple):
    label: int
    path: Path


class _Row(NamedTuple):
    digest: bytes
    pixels: bytes


class _Failure(NamedTuple):
    reason: str
    small: bool = False


def load_folder(folder: Path, size: int) -> FolderImages:
    """The images of a folder at `size` × `size` pixels, from the cache where it knows them.

    Raises:
        DataError: no folder, fewer than two classes, a class without images to learn from and to hold out,
            images smaller than the size, or too few images.
        StorageError: the cache's disk has no room.
    """
    classes, files = _listed(folder)
    facts = [[f.label, str(f.path), *_version(f.path)] for f in files]
    listing = _hash(json.dumps([_VERSION, classes, facts]))
    store = cache_dir() / "folders" / _hash(f"{os.fsencode(folder.resolve())!r}/{size}")[:16]
    with exclusive(store.with_suffix(".lock")):
        index = _read_index(store)
        if index is None or index[0]["listing"] != listing:
            _build(folder, classes, files, size, listing, store)
            index = _read_index(store)
        assert index is not None, "it was just written"
        facts_of, labels = index
        train, test = (
            ImageSet(_mapped(store / f"{name}.u8", len(labels[name]), size), labels[name])
            for name in ("train", "test")
        )
    log.info(
        "%s: %d images of %d classes to learn from, %d held out, at %d×%d%s",
        *(folder, len(train.labels), len(classes), len(test.labels), size, size, facts_of["unread"]),
    )
    return FolderImages(tuple(classes), train, test, facts_of["digest"])


def _listed(folder: Path) -> tuple[list[str], list[_File]]:
    """Classes and files, in natural order of the classes."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder", param="data")
    classes = sorted((p.name for p in folder.iterdir() if p.is_dir() and _counts(p.name)), key=_natural)
    if len(classes) < 2:
        those = f"one sub-folder, {classes[0]!r}" if classes else "no sub-folders"
        raise DataError(
            f"{folder} has {those}: a class is a sub-folder with its images, and two or more are needed",
            param="data",
        )
    if {name.casefold() for name in classes} <= _SPLITS:
        raise DataError(
            f"{folder} is split into {', '.join(classes)}: name the folder of the classes, "
            f"{folder / classes[-1]}; what is held out is chosen here",
            param="data",
        )
    files: list[_File] = []
    for label, name in enumerate(classes):
        if not name.isprintable():
            raise DataError(f"{folder} has a class whose name cannot be printed: {name!a}", param="data")
        found = [_File(label, path) for path in sorted(_pictures(folder / name))]
        if not found:
            raise DataError(
                f"{folder / name} holds no images; put some there or remove it "
                f"({', '.join(sorted(SUFFIXES))})",
                param="data",
            )
        files += found
    return classes, files


def _pictures(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if _counts(name)]
        for name in names:
            if _counts(name) and Path(name).suffix.lower() in SUFFIXES:
                yield Path(place, name)


def _counts(name: str) -> bool:
    return not name.startswith((".", "__"))  # .git, .thumbnails, __MACOSX


def _natural(name: str) -> list[int | str]:
    """Numbers within names by their value."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)] + [name]


def _version(path: Path) -> tuple[int, int]:
    found = path.stat() if path.exists() else path.lstat()
    return found.st_size, found.st_mtime_ns


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _mapped(path: Path, count: int, size: int) -> Tensor:
    pixels = torch.from_file(str(path), shared=False, size=count * 3 * size * size, dtype=torch.uint8)
    return pixels.view(count, 3, size, size)


def _read_index(store: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    path = store / "index.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        labels = {name: file.get_tensor(name).long() for name in ("train", "test")}
        return file.metadata() or {}, labels


def _build(
    folder: Path, classes: Sequence[str], files: Sequence[_File], size: int, listing: str, store: Path
) -> None:
    """Write the cache of a folder, in place of an older one."""
    check_room(store, 2 * len(files) * 3 * size * size, f"the images of {folder}")
    temporary = store.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    labels: list[int] = []
    hashes: list[bytes] = []
    unread: list[tuple[_File, _Failure]] = []
    with (temporary / "rows").open("wb") as rows:
        for file, found in _decoded(files, size):
            if isinstance(found, _Failure):
                unread.append((file, found))
                continue
            rows.write(found.pixels)
            labels.append(file.label)
            hashes.append(found.digest)
    _check(folder, classes, labels, unread, size)
    order = sorted(range(len(labels)), key=lambda i: hashes[i])
    split = dict(zip(("train", "test"), _split(order, labels), strict=True))
    pixels = np.memmap(temporary / "rows", np.uint8, "r", shape=(len(labels), 3 * size * size))
    for name, chosen in split.items():
        with (temporary / f"{name}.u8").open("wb") as file_of_rows:
            for start in range(0, len(chosen), _CHUNK):
                file_of_rows.write(pixels[chosen[start : start + _CHUNK]].tobytes())
    del pixels
    (temporary / "rows").unlink()
    contents = json.dumps([list(classes), [[hashes[i].hex(), labels[i]] for i in order]])
    facts = {"listing": listing, "digest": _hash(contents), "unread": ""}
    if unread:
        facts["unread"] = f"; {len(unread)} could not be read and are left out (first {_shown(*unread[0])})"
    tensors = {name: torch.tensor([labels[i] for i in chosen]) for name, chosen in split.items()}
    save_tensors(tensors, temporary / "index.safetensors", facts)
    shutil.rmtree(store, ignore_errors=True)
    temporary.replace(store)


def _decoded(files: Sequence[_File], size: int) -> Iterator[tuple[_File, _Row | _Failure]]:
    """Every file with its pixels, in order; by threads, since Pillow decodes outside the interpreter."""
    with ThreadPoolExecutor() as pool:
        for start in track(range(0, len(files), _CHUNK), description=f"images at {size}×{size}"):
            part = files[start : start + _CHUNK]
            yield from zip(part, pool.map(partial(_decode, size=size), part), strict=True)


def _decode(file: _File, size: int) -> _Row | _Failure:
    try:
        data = file.path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if min(image.size) < size:
                return _Failure("{}×{}".format(*image.size), small=True)
            return _Row(hashlib.sha256(data).digest(), _square(image, size).tobytes())
    except UnidentifiedImageError:
        return _Failure("no image")
    except UNREADABLE as error:
        return _Failure(" ".join(str(error).split()) or type(error).__name__)


def _square(image: Image.Image, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The middle square of an image as `[3, S, S]`, upright, on white where it is transparent."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"grey levels of more than 8 bits (mode {image.mode})")  # Pillow would cut them off
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        ground = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(ground, upright.convert("RGBA"))
    fitted = ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(fitted).transpose(2, 0, 1)


def _shown(file: _File, failure: _Failure) -> str:
    name = os.fsencode(file.path).decode(errors="replace")
    return f"{name}: {failure.reason}"


def _check(
    folder: Path,
    classes: Sequence[str],
    labels: Sequence[int],
    unread: Sequence[tuple[_File, _Failure]],
    size: int,
) -> None:
    """Refuse images that are too small, and too few of them."""
    if small := [failed for failed in unread if failed[1].small]:
        raise DataError(
            f"{len(small)} of the {len(labels) + len(unread)} images of {folder} are smaller than {size} "
            f"pixels, first {_shown(*small[0])}; choose a smaller --size or remove them",
            param="data",
        )
    counts = Counter(labels)
    for label, name in enumerate(classes):
        if counts[label] < 2:
            lost = [failed for failed in unread if failed[0].label == label]
            why = f", {len(lost)} cannot ({_shown(*lost[0])})" if lost else ""
            raise DataError(
                f"{folder / name} has {counts[label]} images that can be read{why}; a class needs one to "
                "learn from and one to hold out",
                param="data",
            )
    if len(labels) < 2 * LEAST_HELD_OUT:
        raise DataError(
            f"{folder} has {len(labels)} images that can be read, and {2 * LEAST_HELD_OUT} are needed: "
            f"{LEAST_HELD_OUT} are held out for the evaluation",
            param="data",
        )


def _split(order: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows to learn from, and held-out ones: the first tenth of each class in `order`, 20 or more in all."""
    share = max(HELD_OUT, LEAST_HELD_OUT / len(labels))
    left = {label: min(math.ceil(share * n), n - 1) for label, n in Counter(labels).items()}
    train: list[int] = []
    test: list[int] = []
    for i in order:
        held = left[labels[i]] > 0
        left[labels[i]] -= held
        (test if held else train).append(i)
    return train, test
