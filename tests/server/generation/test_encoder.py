"""Images as files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from server.generation.encoder import encode


@pytest.fixture
def pixels() -> np.ndarray:
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), -1).copy()


def test_png_is_exact_and_repeats(pixels: np.ndarray) -> None:
    data = encode(pixels, "png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert encode(pixels, "png") == data


@pytest.mark.parametrize(("name", "pillow"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats_stay_close(pixels: np.ndarray, name: str, pillow: str) -> None:
    image = Image.open(io.BytesIO(encode(pixels, name)))  # type: ignore[arg-type]
    assert image.format == pillow
    assert image.size == (32, 32)
    error = np.abs(np.asarray(image.convert("RGB"), dtype=int) - pixels)
    assert error.mean() < 3
