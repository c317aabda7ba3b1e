"""Inception features of images, computed once: chunks on disk, named by what is in them.

A chunk is a file `HASH-PRECISION.safetensors`, HASH being over the pixels and the network. So
features of real images are shared by every run on this machine (`real_store`), a killed run
goes on at the chunk where it stopped, and no figure can come from features of other images.

`python -m training.metrics.features --check` measures 5,000 against 5,000 test images, the check of an
installation: FID 10.34 in float32. `--bench 64` compares the precisions.

Shapes: N images, D = 2048 features, H W pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor

from dd_core.errors import InvalidRequestError
from dd_core.files import save_tensors
from dd_core.runtime import pick_device
from training import parallel
from training.data.cifar10 import cifar10
from training.data.packages import DataError, cache_dir
from training.metrics.fid import frechet_distance, kernel_distance
from training.metrics.inception import SIDE, Inception, inception_weights

log = logging.getLogger("dd_train")

Precision = Literal["float32", "bfloat16"]
CHUNK = 500  # images a file; half of CIFAR-10's test set is a whole number of chunks
CHECK_FID = 10.34
_VERSION = 1  # raise it when the arithmetic changes, so that no old features are taken


def resize_matrix(source: int, target: int) -> Tensor:
    """`[target, source]` float64: one axis of the original graph's bilinear resize.

    target i reads source position i · source / target (no half-pixel shift), between its two
    neighbours, edges clamped.
    """
    place = torch.arange(target, dtype=torch.float64) * (source / target)
    low = place.floor().long().clamp(max=source - 1)
    high = (low + 1).clamp(max=source - 1)
    part = place - low
    rows = torch.arange(target)
    matrix = torch.zeros(target, source, dtype=torch.float64)
    matrix[rows, low] += 1 - part
    matrix[rows, high] += part
    return matrix


def legacy_resize(image_N3HW: Tensor, side: int = SIDE) -> Tensor:
    """`[N, 3, H, W]` of any type → `[N, 3, side, side]` float32, not rounded.

    Products are float64: a GPU may be set to multiply float32 matrices in TF32.
    """
    height, width = image_N3HW.shape[-2:]
    down = resize_matrix(height, side).to(image_N3HW.device)
    across = resize_matrix(width, side).to(image_N3HW.device)
    return (down @ image_N3HW.double() @ across.T).float()


class Extractor(Protocol):
    """A map from images to features, which says of which network and precision they are."""

    @property
    def precision(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, image_N3HW: Tensor, /) -> Tensor: ...


class FeatureExtractor:
    """Images → 2048 features of the usual FID graph.

    Args:
        device: where the network runs.
        precision: `float32`, the one to report figures in; or `bfloat16`, about half the time
            on a CPU that multiplies it in hardware. Features differ by 2–3% then, the same on
            both sides of a distance; never hold one precision against the other.
        batch: images a forward pass; None = 16 on a CPU (a larger batch leaves its caches), 250 on a GPU.
        weights: the TorchScript file; None = `inception_weights()`.

    Raises:
        InvalidRequestError: an unknown precision.
        DataError: the weights cannot be had, or are another network's.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
        batch: int | None = None,
        weights: Path | None = None,
    ) -> None:
        if precision not in get_args(Precision):
            choices = ", ".join(get_args(Precision))
            raise InvalidRequestError(
                f"precision must be one of {choices}, not {precision!r}", param="precision"
            )
        path = weights or inception_weights()
        self.device = torch.device(device)
        self.precision: str = precision
        self.batch = batch or (16 if self.device.type == "cpu" else 250)
        if not path.is_file():
            raise DataError(f"no Inception weights at {path}", param="inception")
        with path.open("rb") as file:
            self.fingerprint = f"{hashlib.file_digest(file, 'sha256').hexdigest()}/{_VERSION}"
        self.network = Inception(path, getattr(torch, precision)).eval().to(self.device)

    @torch.no_grad()
    def __call__(self, image_N3HW: Tensor) -> Tensor:
        """uint8 `[N, 3, H, W]` → float32 `[N, 2048]` on the CPU.

        Raises:
            InvalidRequestError: no images, or not uint8 colour images.
        """
        _check_images(image_N3HW)
        with _full_float32():
            parts = [
                self.network((legacy_resize(part.to(self.device)) - 128) / 128).cpu()
                for part in torch.split(image_N3HW, self.batch)
            ]
        return torch.cat(parts)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Inside, a GPU's float32 convolutions are float32: by default they are TF32, 10 bits of mantissa."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before


def real_store() -> Path:
    """The folder of features of real images, for all runs."""
    return cache_dir() / "features"


def features_of(image_N3HW: Tensor, extractor: Extractor, store: Path, title: str = "features") -> Tensor:
    """`[N, 2048]` features of uint8 images `[N, 3, H, W]`, from `store` as far as they are there.

    Every `CHUNK` images are written to `store` as soon as they are computed. Of several ranks each computes
    its share, and waits for the others: the store of real images is each machine's, any other one all ranks'.

    Raises:
        InvalidRequestError: no images, or not uint8 colour images.
    """
    _check_images(image_N3HW)
    store.mkdir(parents=True, exist_ok=True)
    chunks = torch.split(image_N3HW, CHUNK)
    paths = [store / f"{_chunk_name(chunk, extractor)}.safetensors" for chunk in chunks]
    own = parallel.rows_of_machine() if store == real_store() else parallel.own_rows()
    for chunk, path in zip(_shown(chunks[own], title), paths[own], strict=True):
        if not path.exists():
            save_tensors({"features": extractor(chunk)}, path)
    parallel.barrier()
    return torch.cat([load_file(path)["features"] for path in paths])


def content_hash(*tensors: Tensor) -> str:
    """SHA-256 over shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}/{tensor.dtype}/".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _chunk_name(image_N3HW: Tensor, extractor: Extractor) -> str:
    key = f"{extractor.fingerprint}/{content_hash(image_N3HW)}"
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}-{extractor.precision}"


def _check_images(image_N3HW: Tensor) -> None:
    right = image_N3HW.ndim == 4 and image_N3HW.shape[1] == 3 and len(image_N3HW) > 0
    if not right or image_N3HW.dtype != torch.uint8:
        raise InvalidRequestError(
            "features are of one or more uint8 images [N, 3, H, W], "
            f"not {image_N3HW.dtype} {list(image_N3HW.shape)}",
            param="images",
        )


def _shown(chunks: Sequence[Tensor], title: str) -> Iterator[Tensor]:
    """The chunks, with a progress bar (or log lines where there is no terminal)."""
    total, done, began = sum(map(len, chunks)), 0, time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, refresh_per_second=2, disable=not parallel.is_main()) as bar:
        task = bar.add_task(title, total=total, rate="")
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            rate = done / (time.perf_counter() - began)
            bar.update(task, completed=done, rate=f"{rate:.1f}/s")
            if not bar.console.is_terminal:
                log.info("%s %d/%d %.1f/s %.0fs left", title, done, total, rate, (total - done) / rate)


def check_installation(extractor: FeatureExtractor, images: int = 5_000) -> dict[str, float]:
    """FID and KID of the first `images` CIFAR-10 test images against the next `images`."""
    pictures = cifar10("test").images
    first = features_of(pictures[:images], extractor, real_store(), "first half")
    second = features_of(pictures[images : 2 * images], extractor, real_store(), "second half")
    kid, kid_std = kernel_distance(first, second)
    return {"fid": frechet_distance(first, second), "kid": kid, "kid_std": kid_std}


def _bench(device: torch.device, images: int) -> None:
    pictures = cifar10("test").images[:images]
    exact: Tensor | None = None
    for precision in get_args(Precision):
        extractor = FeatureExtractor(device, precision)
        extractor(pictures[: extractor.batch])
        wall, cpu = time.perf_counter(), time.process_time()
        features = extractor(pictures)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        exact = features if exact is None else exact
        error = ((features - exact).norm(dim=1) / exact.norm(dim=1)).mean()
        shift = (features.mean(0) - exact.mean(0)).norm() / exact.mean(0).norm()
        cosine = torch.cosine_similarity(features, exact).mean()
        log.info("%s: %.1f images/s, %.3f CPU-s an image", precision, images / wall, cpu / images)
        log.info("  against float32: error %.4f, of the mean %.4f, cosine %.5f", error, shift, cosine)


def main() -> None:
    """The commands `--check` and `--bench`."""
    parser = argparse.ArgumentParser(prog="python -m training.metrics.features")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="first half of the test set against the second")
    what.add_argument("--bench", type=int, metavar="IMAGES", help="speed and agreement of the precisions")
    parser.add_argument("--images", type=int, default=5_000, help="images a half for --check")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = pick_device(args.device)
    if args.bench:
        _bench(device, args.bench)
        return
    found = check_installation(FeatureExtractor(device, args.precision), args.images)
    log.info("%d against %d test images, %s: %s", args.images, args.images, args.precision, found)
    if args.images == 5_000:
        off = abs(found["fid"] - CHECK_FID)
        log.info("float32 gives FID %.2f; off by %.3f", CHECK_FID, off)
        if args.precision == "float32" and off > 0.02:
            raise SystemExit("this installation does not measure what others measure")


if __name__ == "__main__":
    main()
