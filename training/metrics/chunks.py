"""A plan's images and their features, drawn and kept a chunk at a time.

50,000 pictures of 256×256 are 10 GB: they are never all in memory, and a killed evaluation goes on with the
chunk where it stopped.

Shapes: N images, D features, H W pixels.
"""

from __future__ import annotations

import logging
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dd_core.files import metadata_of, replacing, save_tensors
from dd_core.plan import Plan
from dd_core.sampling import Sampler, sample_images
from training import parallel
from training.data.conditions import Conditions
from training.metrics.features import CHUNK, Extractor

log = logging.getLogger("dd_train")


class Chunks:
    """The chunks of one plan in `folder`: image i has the label i mod `conditions.count`, the key (seed, i).

    Args:
        fingerprint: of all that the images and features follow from but their number.
        keep: the pictures are kept beside their features, for `write_npz`.
        score: pictures `[N, H, W, 3]` and labels `[N]` → a score each, which is kept beside the features.
    """

    def __init__(
        self,
        folder: Path,
        images: int,
        fingerprint: str,
        keep: bool,
        score: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.folder, self.images, self.fingerprint, self.keep = folder, images, fingerprint, keep
        self.score = score

    def draw(
        self,
        sampler: Sampler,
        plan: Plan,
        conditions: Conditions,
        extractor: Extractor,
        *,
        seed: int,
        batch: int,
    ) -> None:
        """Draw missing chunks, in batches of `batch`; of several ranks each its share, and all wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, refresh_per_second=2, disable=not parallel.is_main()) as bar:
            task, began, made = bar.add_task(plan.name, total=self.images), time.perf_counter(), 0
            for start in range(0, self.images, CHUNK)[parallel.own_rows()]:
                size = min(CHUNK, self.images - start)
                if not self._complete(start, size):
                    index = range(start, start + size)
                    pictures = torch.cat(
                        [
                            sample_images(
                                sampler, plan, conditions(_labels(part, conditions)), _keys(part, seed)
                            )
                            for part in (index[i : i + batch] for i in range(0, size, batch))
                        ]
                    )
                    tensors = {"features": extractor(pictures.permute(0, 3, 1, 2).contiguous())}
                    tensors |= {"images": pictures} if self.keep else {}
                    if self.score is not None:
                        tensors["scores"] = self.score(pictures, _labels(index, conditions))
                    save_tensors(tensors, self._path(start), {"fingerprint": self.fingerprint})
                    made += size
                bar.update(task, completed=start + size)
                rate = made / (time.perf_counter() - began)
                if made and not bar.console.is_terminal:
                    done, left = start + size, (self.images - start - size) / rate
                    log.info("%s: %d/%d images %.1f/s %.0fs left", plan.name, done, self.images, rate, left)
        parallel.barrier()

    def features(self) -> Tensor:
        """Features `[N, D]` of all images, which have been drawn."""
        return self._all("features")

    def scores(self) -> Tensor | None:
        """Scores `[N]` of all images; None without `score`."""
        return None if self.score is None else self._all("scores")

    def _all(self, name: str) -> Tensor:
        starts = range(0, self.images, CHUNK)
        return torch.cat([load_file(self._path(start))[name] for start in starts])

    def write_npz(self, path: Path, conditions: Conditions) -> None:
        """`arr_0` uint8 `[N, H, W, 3]` and `arr_1` labels `[N]`, as ADM's evaluator reads a set of samples.

        Raises:
            KeyError: the pictures were not kept.
        """
        first = next(self._pictures())
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.images, *first.shape[1:])}
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, header)
                for part in self._pictures():
                    out.write(part.contiguous().numpy().tobytes())
            with file.open("arr_1.npy", "w") as out:
                labels = _labels(range(self.images), conditions).numpy()
                np.lib.format.write_array(out, labels, allow_pickle=False)

    def remove(self) -> None:
        """Forgets the chunks."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pictures(self) -> Iterator[Tensor]:
        for start in range(0, self.images, CHUNK):
            yield load_file(self._path(start))["images"][: self.images - start]

    def _complete(self, start: int, size: int) -> bool:
        path = self._path(start)
        if metadata_of(path).get("fingerprint") != self.fingerprint:
            return False
        with safe_open(path, "pt") as file:
            enough = file.get_slice("features").get_shape()[0] == size
            return enough and (not self.keep or "images" in file.keys())  # noqa: SIM118

    def _path(self, start: int) -> Path:
        return self.folder / f"{start // CHUNK:05d}.safetensors"


def _labels(index: range, conditions: Conditions) -> Tensor:
    return torch.tensor(index) % conditions.count


def _keys(index: range, seed: int) -> list[tuple[int, int]]:
    return [(seed, i) for i in index]
