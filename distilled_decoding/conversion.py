"""Conversion of a received image into another format, by Pillow where it is installed."""

from __future__ import annotations

import io
from importlib import import_module

from distilled_decoding.contract import EXIF_RECEIPT, PNG_RECEIPT, QUALITY, ImageFormat


def converted(data: bytes, wanted: ImageFormat, receipt: str) -> bytes:
    """Return an image's file in the format `wanted`, with the receipt in it.

    Raises:
        ImportError: Pillow is not installed.
    """
    pillow, png = import_module("PIL.Image"), import_module("PIL.PngImagePlugin")
    buffer = io.BytesIO()
    with pillow.open(io.BytesIO(data)) as image:
        if wanted == "png":
            about = png.PngInfo()
            about.add_text(PNG_RECEIPT, receipt)
            image.save(buffer, "PNG", pnginfo=about)
        else:
            exif = pillow.Exif()
            exif[EXIF_RECEIPT] = receipt
            image.save(buffer, wanted.upper(), quality=QUALITY, subsampling=0, exif=exif)
    return buffer.getvalue()
