"""The real set that generated images are held against: a folder of pictures, or an .npz of ADM's evaluator.

An .npz may have `mu` [D] and `sigma` [D, D], which give FID alone; `arr_0` [M, H, W, 3] uint8, pictures whose
features are computed here; and `activations` [M, D], features that others computed. Where `mu` and `sigma`
are there, FID is held against them, and the other figures against the pictures or features beside them:
ADM's reference for ImageNet has statistics of the whole training set and 10,000 pictures of it.

Shapes: M real images, D features, H W pixels.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from dd_core.errors import reason
from dd_core.files import save_tensors
from training import parallel
from training.data.images import SUFFIXES, UNREADABLE
from training.data.packages import DataError
from training.metrics.features import CHUNK, Extractor, content_hash, features_of, real_store
from training.metrics.fid import Gaussian

log = logging.getLogger("dd_train")

LEAST = 10  # real images; no figure means anything below that


@dataclass(frozen=True)
class Reference:
    """Real images as the figures need them.

    Args:
        source: the path that was read.
        gaussian: mean and covariance, for FID.
        features_MD: for KID, precision and recall; None where statistics are all there is.
        skipped: files of a folder that are no readable pictures.
        fingerprint: SHA-256 of what was read.
    """

    source: str
    gaussian: Gaussian
    features_MD: Tensor | None
    skipped: int
    fingerprint: str

    @property
    def images(self) -> int:
        """M; 0 where the statistics do not say of how many images they are."""
        return self.gaussian.count or (0 if self.features_MD is None else len(self.features_MD))


def read_reference(path: Path, extractor: Extractor) -> Reference:
    """The reference at `path`, its features from the store of real features as far as they are there.

    Raises:
        DataError: no such path, no pictures, too few of them, an .npz without the keys, or features of
            another width than the extractor's.
    """
    if path.is_dir():
        return _of_folder(path, extractor)
    if path.suffix == ".npz" and path.is_file():
        return _of_npz(path, extractor)
    raise DataError(f"{path} is neither a folder of pictures nor an .npz file", param="reference")


def picture_files(folder: Path) -> list[Path]:
    """Files below `folder` that are pictures by their names, in the order of their paths.

    Raises:
        DataError: there are none.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        kinds = " ".join(sorted(SUFFIXES))
        raise DataError(f"{folder} holds no pictures ({kinds})", param="reference")
    return files


def _of_folder(folder: Path, extractor: Extractor) -> Reference:
    files = picture_files(folder)
    digest, parts = hashlib.sha256(), []
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    if parallel.connected():  # each rank of a machine computes its share, which the loop below finds then
        for chunk in chunks[parallel.rows_of_machine()]:
            _features_of_files(chunk, extractor)
        parallel.barrier()
    for chunk in track(chunks, description="reference", disable=len(chunks) < 2 or not parallel.is_main()):
        name, features = _features_of_files(chunk, extractor)
        digest.update(name.encode())
        parts += [features] if len(features) else []
    found = torch.cat(parts) if parts else torch.empty(0, 0)
    skipped = len(files) - len(found)
    if skipped:
        log.warning(
            "%s: %d of %d files are no readable pictures and are left out", folder, skipped, len(files)
        )
    _enough(folder, len(found))
    return Reference(str(folder), Gaussian.of(found), found, skipped, digest.hexdigest())


def _features_of_files(files: Sequence[Path], extractor: Extractor) -> tuple[str, Tensor]:
    """The hash of the files' contents, and `[M, D]` features of those that can be read."""
    digest = hashlib.sha256(f"{extractor.fingerprint}/{extractor.precision}".encode())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    store = real_store()
    store.mkdir(parents=True, exist_ok=True)
    kept = store / f"folder-{digest.hexdigest()[:32]}.safetensors"
    if not kept.exists():
        # Pictures of one size go through the network together.
        groups = groupby(_readable(files), key=lambda image: image.shape)
        parts = [extractor(torch.stack(list(group))) for _, group in groups]
        save_tensors({"features": torch.cat(parts) if parts else torch.empty(0, 0)}, kept)
    return digest.hexdigest(), load_file(kept)["features"]


def _readable(files: Sequence[Path]) -> Iterator[Tensor]:
    """uint8 `[3, H, W]` of every file that is a picture."""
    for path in files:
        try:
            with Image.open(path) as picture:
                pixels = np.array(picture.convert("RGB"))
        except UNREADABLE as error:
            log.warning("%s is left out: %s", path, error)
            continue
        yield torch.from_numpy(pixels).permute(2, 0, 1)


def _of_npz(path: Path, extractor: Extractor) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as file:
            known = {"mu", "sigma", "arr_0", "activations"} & set(file.files)
            names, arrays = file.files, {name: file[name] for name in sorted(known)}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not an .npz that can be read ({reason(error)})", param="reference"
        ) from error
    if not ({"mu", "sigma"} <= known or known & {"arr_0", "activations"}):
        raise DataError(
            f"{path} has the keys {', '.join(names) or 'none'}; a reference has mu and sigma, arr_0 "
            "(pictures) or activations",
            param="reference",
        )
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    features = None
    if "activations" in tensors:
        features = tensors["activations"].float()
        _wide(path, "activations", features, 2, extractor)
    elif "arr_0" in tensors:
        images = tensors["arr_0"]
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8 or not len(images):
            raise DataError(
                f"{path}: arr_0 must be uint8 pictures [M, H, W, 3], not {images.dtype} {list(images.shape)}",
                param="reference",
            )
        features = features_of(images.permute(0, 3, 1, 2), extractor, real_store(), "reference")
    if features is not None:
        _enough(path, len(features))
    if {"mu", "sigma"} <= known:
        mean, covariance = tensors["mu"].double(), tensors["sigma"].double()
        _wide(path, "mu", mean, 1, extractor)
        _wide(path, "sigma", covariance, 2, extractor)
        gaussian = Gaussian(mean, covariance, 0)
    else:
        assert features is not None, "one of the keys is there"
        gaussian = Gaussian.of(features)
    return Reference(str(path), gaussian, features, 0, content_hash(*tensors.values()))


def _wide(path: Path, key: str, found: Tensor, dimensions: int, extractor: Extractor) -> None:
    """Refuse features of another width than the extractor's."""
    width = extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]
    square = key != "sigma" or found.shape[0] == width
    if found.ndim != dimensions or found.shape[-1] != width or not square:
        raise DataError(
            f"{path}: {key} is {list(found.shape)}, of another network than ours, whose features are "
            f"{width} wide",
            param="reference",
        )


def _enough(path: Path, count: int) -> None:
    if count < LEAST:
        raise DataError(
            f"{path} has {count} real images; the figures need {LEAST} or more", param="reference"
        )
