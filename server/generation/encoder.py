"""Encode pixels as files that carry the image's receipt in their metadata, and read it back.

Pillow's encoders release the GIL, so threads encode in parallel. PNG holds the receipt in the text chunk
`dd-receipt`, JPEG and WebP in the EXIF field ImageDescription.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never, get_args

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dd_core.errors import InvalidRequestError
from dd_core.plan import Plan
from distilled_decoding.contract import EXIF_RECEIPT, PNG_RECEIPT, QUALITY, ImageFormat
from server.devices.messages import Pixels
from server.generation.sizes import Size, resample

# What `Accept` may ask for, and `Content-Type` says.
MEDIA_TYPES: dict[ImageFormat, str] = {name: f"image/{name}" for name in get_args(ImageFormat)}
# Pixels that are encoded on the event loop: four images of 32×32 or one of 64×64, 0.2 ms.
_INLINE_PIXELS = 2**12
# Pixels that one thread is given together: sixteen images of 32×32, and never two of 256×256.
_PIXELS_PER_TASK = 2**14


@dataclass(frozen=True)
class Encoding:
    """A file format, the quality of JPEG and WebP (0 to 100), and a size other than the model's own."""

    image_format: ImageFormat
    quality: int = QUALITY
    size: Size | None = None


@dataclass(frozen=True)
class GeneratedImage:
    """One encoded image of a request; `seed` and `number` name its newest noise."""

    index: int  # its place in the request
    seed: int
    number: int
    plan: Plan
    stage: int  # 0 for the first image of this index, and so on
    final: bool  # no better one follows
    receipt: str  # all that it follows from
    width: int
    height: int
    data: bytes  # the file
    timings: dict[str, float]  # milliseconds: the contract's `Timings`, `total_ms` since it arrived


def encode(
    pixels: Pixels,
    image_format: ImageFormat,
    receipt: str = "",
    quality: int = QUALITY,
    size: Size | None = None,
) -> bytes:
    """Encode one image `[H, W, 3]` uint8 as a file. PNG is exact; JPEG and WebP are at `quality` (0 to 100);
    with a `size`, the pixels are resampled to it.

    The same arguments give the same bytes: nothing else goes in.
    """
    image = Image.fromarray(pixels)
    if size is not None:
        image = resample(image, size)
    buffer = io.BytesIO()
    if image_format == "png":
        about = PngImagePlugin.PngInfo()
        if receipt:
            about.add_text(PNG_RECEIPT, receipt)
        # Level 1: a third of the time of the default for a few percent more bytes.
        image.save(buffer, "PNG", compress_level=1, pnginfo=about)
        return buffer.getvalue()
    exif = Image.Exif()
    if receipt:
        exif[EXIF_RECEIPT] = receipt
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0, exif=exif)
    elif image_format == "webp":
        image.save(buffer, "WEBP", quality=quality, method=2, exif=exif)
    else:
        assert_never(image_format)  # a new format must not leave as a WebP file
    return buffer.getvalue()


def read_receipt(path: Path) -> str:
    """Read the receipt in an image file that this server made.

    Raises:
        InvalidRequestError: it is no image, or holds none.
    """
    try:
        with Image.open(path, formats=[name.upper() for name in MEDIA_TYPES]) as image:
            found = image.info.get(PNG_RECEIPT) or image.getexif().get(EXIF_RECEIPT)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no PNG, JPEG or WebP"
        raise InvalidRequestError(f"{path}: {reason}", param="file") from None
    if not isinstance(found, str) or not found:
        raise InvalidRequestError(f"{path} holds no receipt", param="file")
    return found


class Encoder:
    """Encodes small images on the event loop and larger ones in threads.

    To wake a thread and to be woken by it costs more than encoding an image of 32×32; one of 256×256
    would hold up the event loop for milliseconds.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    async def encode_all(
        self, images: Sequence[Pixels], receipts: Sequence[str], encoding: Encoding
    ) -> list[bytes]:
        """Encode every image as a file, in order; all have the same size."""
        tasks = list(zip(images, receipts, strict=True))
        (height, width), made = images[0].shape[:2], encoding.size or (0, 0)
        area = max(height * width, made[0] * made[1])
        if area * len(images) <= _INLINE_PIXELS:
            return _encode_part(tasks, encoding)
        loop, size = asyncio.get_running_loop(), max(1, _PIXELS_PER_TASK // area)
        parts = [
            loop.run_in_executor(self._pool, _encode_part, tasks[i : i + size], encoding)
            for i in range(0, len(tasks), size)
        ]
        return [file for part in await asyncio.gather(*parts) for file in part]

    def close(self) -> None:
        """Stop the threads once they have finished what they hold."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _encode_part(tasks: Sequence[tuple[Pixels, str]], encoding: Encoding) -> list[bytes]:
    of = encoding
    return [encode(pixels, of.image_format, receipt, of.quality, of.size) for pixels, receipt in tasks]
