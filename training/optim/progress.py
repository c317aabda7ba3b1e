"""Progress of a stage: steps, images seen, epochs, rate, time left, peak memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch

from dd_core.errors import RecipeError


@dataclass(frozen=True)
class Progress:
    """How far a stage has come.

    Args:
        step: updates made.
        per_s: updates a second since this process began.
        images: images seen, also those seen again; a pair of the student's is one image.
        epochs: the same in passes over all images.
        left_s: seconds until the last update, at this rate.
        memory_gb: the most that this process has held at once: CUDA tensors where it uses a GPU (of its
            fullest one), else resident memory.
    """

    step: int
    per_s: float
    images: int
    epochs: float
    left_s: float
    memory_gb: float

    def __str__(self) -> str:
        return (
            f"{self.per_s:.2f}/s, {self.images:,} images, {self.epochs:.2f} epochs, "
            f"{timedelta(seconds=round(self.left_s))} left, {self.memory_gb:.1f} GB"
        )


FID_IMAGES, FID_SECONDS = "fid_images", "fid_seconds"  # of a line that has FIDs of a student
# Fields of a line that say how far a stage is, or how something was measured; the others are figures.
FIELDS = frozenset(Progress.__dataclass_fields__) | {FID_IMAGES, FID_SECONDS}


class Pace:
    """The progress of a stage that this process began at step `first`.

    Args:
        steps: number of updates of the whole stage.
        batch: images of an update, of all ranks and parts together.
        per_epoch: updates of an epoch.
    """

    def __init__(self, first: int, steps: int, batch: int, per_epoch: int) -> None:
        self._first, self._steps, self._batch, self._per_epoch = first, steps, batch, per_epoch
        self._began = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leaves out time that went into something else than updates."""
        self._began += seconds

    def at(self, step: int) -> Progress:
        """The progress after so many updates, now."""
        rate = (step - self._first) / (time.perf_counter() - self._began)
        return Progress(
            step,
            round(rate, 3),
            step * self._batch,
            round(step / self._per_epoch, 4),
            round((self._steps - step) / rate, 1),
            round(peak_memory() / 1e9, 3),
        )


def record_of(progress: Progress, figures: dict[str, float]) -> dict[str, float]:
    """A line of a journal."""
    return asdict(progress) | figures


def read_journal(path: Path) -> list[dict[str, float]]:
    """The lines of a stage's journal, `[]` where it has not begun; one that is half written is left out.

    Raises:
        RecipeError: it is no journal.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise RecipeError(f"{path} is no journal of a stage: {error}", param="run") from None


def newest(lines: list[dict[str, float]]) -> dict[str, float] | None:
    """The last line that says how far the stage is; a line of a student's FID does not."""
    return next((line for line in reversed(lines) if FID_IMAGES not in line), None)


def figures_of(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Lines of a journal without how far the stage was, but for the step."""
    return [{k: v for k, v in line.items() if k == "step" or k not in FIELDS} for line in lines]


def peak_memory() -> int:
    """Bytes that this process has held at once at most, on its fullest GPU if it uses one."""
    if on_gpu := max(
        (torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())), default=0
    ):
        return on_gpu
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
