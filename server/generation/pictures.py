"""Encoded pictures, and the times that they took: what replies of every form are made of."""

from __future__ import annotations

from dataclasses import dataclass

from distilled_decoding.contract import ImageFormat
from server.generation.encoder import QUALITY
from server.scheduling.jobs import Job


@dataclass(frozen=True)
class Form:
    """How images are encoded; `quality` is of JPEG and WebP, 0 to 100."""

    image_format: ImageFormat
    quality: int = QUALITY


@dataclass(frozen=True)
class File:
    """One encoded picture: its place in the order, its size in pixels, its receipt."""

    index: int
    width: int
    height: int
    receipt: str
    data: bytes


@dataclass(frozen=True)
class Made:
    """All images of an order, and the milliseconds that they took."""

    files: list[File]
    times: dict[str, float]


def milliseconds(seconds: float) -> float:
    """Seconds as the replies show them."""
    return round(1e3 * seconds, 3)


def timings(job: Job, encode: float, total: float) -> dict[str, float]:
    """Milliseconds that a request waited, computed, encoded and took in all; arguments in seconds."""
    return {
        "queue_ms": milliseconds(job.queue_s),
        "compute_ms": milliseconds(job.compute_s),
        "encode_ms": milliseconds(encode),
        "total_ms": milliseconds(total),
    }
