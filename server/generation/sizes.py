"""Sizes that pictures are asked for in, and the resampling of a model's own size to them."""

from __future__ import annotations

import re

from PIL import Image

from server.errors import BadRequestError, shortened

Size = tuple[int, int]  # width and height in pixels

MAX_SIDE = 2048
MAX_PIXELS = 2**24  # of all images of a request: sixteen of 1024×1024
_SIZE = re.compile(r"\s*(\d{1,9})\s*(?:[x×*]\s*(\d{1,9})\s*)?", re.ASCII | re.IGNORECASE)


def parse_size(asked: str | int | None, native: Size, images: int = 1) -> Size | None:
    """Return the size that is asked for, or None for the model's own.

    Args:
        asked: `512x256`, `512*256`, `512` for both sides; `auto`, an empty text or None for the model's own.
        native: the model's own size.
        images: so many of them are made in one request.

    Raises:
        BadRequestError: another form; a side above `MAX_SIDE`, or all images above `MAX_PIXELS`.
    """
    if asked is None or (text := str(asked).strip().lower()) in ("", "auto"):
        return None
    found = _SIZE.fullmatch(text)
    width, height = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise BadRequestError(
            f"size must be auto, or WIDTHxHEIGHT with sides from 1 to {MAX_SIDE} pixels, "
            f"not {shortened(str(asked))!r}",
            param="size",
        )
    if (width, height) == native:
        return None
    if width * height * images > MAX_PIXELS:
        raise BadRequestError(
            f"{images} images of {width}x{height} are more than {MAX_PIXELS} pixels: "
            "ask for fewer, or for smaller ones",
            param="size",
        )
    return width, height


def shown(size: Size) -> str:
    """Write a size as requests and replies do."""
    return f"{size[0]}x{size[1]}"


def resample(image: Image.Image, size: Size) -> Image.Image:
    """Resample to exactly `size`: nearest where both sides are multiples, so that pixels stay squares of one
    colour, Lanczos otherwise.
    """
    multiple = size[0] % image.width == 0 and size[1] % image.height == 0
    return image.resize(size, Image.Resampling.NEAREST if multiple else Image.Resampling.LANCZOS)
