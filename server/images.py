"""Pixels → bytes, with the image's receipt in the file's own metadata, and back out of it.

Pillow's encoders release the GIL, so threads encode in parallel. PNG holds the receipt in the text chunk
`dd-receipt`, JPEG and WebP in the EXIF field ImageDescription.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dd_core.errors import InvalidRequestError
from server.schemas import ImageFormat

Pixels = NDArray[np.uint8]
MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = 95  # of JPEG and WebP
_CHUNK = "dd-receipt"
_EXIF_DESCRIPTION = 0x010E
# Pixels that one thread is given at once: sixteen pictures of 32×32, and never two of 256×256.
_TOGETHER = 2**14


def encode(pixels: Pixels, image_format: ImageFormat, receipt: str = "", quality: int = QUALITY) -> bytes:
    """One image `[H, W, 3]` uint8 as a file. PNG is exact; JPEG and WebP are at `quality` (0 to 100).

    The same pixels and receipt give the same bytes: nothing else goes in.
    """
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if image_format == "png":
        about = PngImagePlugin.PngInfo()
        if receipt:
            about.add_text(_CHUNK, receipt)
        # Level 1: a third of the time of the default for a few percent more bytes.
        image.save(buffer, "PNG", compress_level=1, pnginfo=about)
        return buffer.getvalue()
    exif = Image.Exif()
    if receipt:
        exif[_EXIF_DESCRIPTION] = receipt
    if image_format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0, exif=exif)
    else:
        image.save(buffer, "WEBP", quality=quality, method=2, exif=exif)
    return buffer.getvalue()


def read_receipt(path: Path) -> str:
    """The receipt in an image file that this server made.

    Raises:
        InvalidRequestError: it is no image, or holds none.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            found = image.info.get(_CHUNK) or image.getexif().get(_EXIF_DESCRIPTION)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no PNG, JPEG or WebP"
        raise InvalidRequestError(f"{path}: {reason}", param="file") from None
    if not isinstance(found, str) or not found:
        raise InvalidRequestError(f"{path} holds no receipt", param="file")
    return found


class _Task(NamedTuple):
    """A picture to encode, and where its bytes go."""

    future: asyncio.Future[bytes]
    pixels: Pixels
    image_format: ImageFormat
    receipt: str
    quality: int


def _encode_part(loop: asyncio.AbstractEventLoop, part: Sequence[_Task]) -> None:
    results: list[bytes | Exception] = []
    for task in part:
        try:
            results.append(encode(task.pixels, task.image_format, task.receipt, task.quality))
        except Exception as error:  # noqa: BLE001 (raised where the picture is waited for)
            results.append(error)
    loop.call_soon_threadsafe(_settle, part, results)


def _settle(part: Sequence[_Task], results: Sequence[bytes | Exception]) -> None:
    for task, result in zip(part, results, strict=True):
        if task.future.done():  # whoever waited has left in the meantime
            continue
        if isinstance(result, Exception):
            task.future.set_exception(result)
        else:
            task.future.set_result(result)


class Encoder:
    """A thread pool, so that encoding never holds up the event loop or the device.

    Small pictures that are ready together, as those of one pass are, go to a thread together: to wake it
    and to be woken by it costs as much as encoding one.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._waiting: list[_Task] = []

    async def encode_all(
        self,
        images: Sequence[Pixels],
        image_format: ImageFormat,
        receipts: Sequence[str],
        quality: int = QUALITY,
    ) -> list[bytes]:
        """Every image as a file, in order."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._hand_out, loop)
        tasks = [
            _Task(loop.create_future(), pixels, image_format, receipt, quality)
            for pixels, receipt in zip(images, receipts, strict=True)
        ]
        self._waiting += tasks
        return list(await asyncio.gather(*(task.future for task in tasks)))

    def _hand_out(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the threads what has come since the event loop's last round."""
        tasks, self._waiting = self._waiting, []
        part: list[_Task] = []
        room = _TOGETHER
        for task in tasks:
            size = task.pixels.shape[0] * task.pixels.shape[1]
            if part and size > room:
                self._pool.submit(_encode_part, loop, part)
                part, room = [], _TOGETHER
            part.append(task)
            room -= size
        if part:
            self._pool.submit(_encode_part, loop, part)

    def close(self) -> None:
        """Stop the threads once they have finished what they hold."""
        self._pool.shutdown(wait=False, cancel_futures=True)
