"""Sizes as clients write them, and pictures resampled to them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from server.errors import BadRequestError
from server.generation.encoder import encode
from server.generation.sizes import MAX_SIDE, Size, parse_size

NATIVE = (32, 32)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        (None, None),
        ("auto", None),
        ("Auto", None),
        ("", None),
        ("32x32", None),
        ("32", None),
        ("1024x1024", (1024, 1024)),
        ("1792x1024", (1792, 1024)),
        ("512*256", (512, 256)),
        ("512×256", (512, 256)),
        (" 512 X 256 ", (512, 256)),
        ("512", (512, 512)),
        (512, (512, 512)),
        (f"{MAX_SIDE}x1", (MAX_SIDE, 1)),
    ],
)
def test_every_form_of_a_size_is_read(asked: str | int | None, size: Size | None) -> None:
    assert parse_size(asked, NATIVE) == size


@pytest.mark.parametrize(
    "asked",
    ["big", "0x32", "32x0", "-1x5", "2049x1", "1x2049", "9" * 5000, "1x2x3", "1.5x2", 0, -5, "16:9", "٣"],
)
def test_another_size_is_refused_with_the_forms_and_the_limit(asked: str | int) -> None:
    with pytest.raises(BadRequestError, match=r"WIDTHxHEIGHT with sides from 1 to 2048") as refused:
        parse_size(asked, NATIVE)
    assert refused.value.param == "size" and len(refused.value.message) < 200


def test_the_pixels_of_a_whole_request_are_bounded() -> None:
    assert parse_size("1024x1024", NATIVE, 16) == (1024, 1024)
    assert parse_size("2048x2048", NATIVE, 4) == (2048, 2048)
    with pytest.raises(BadRequestError, match="5 images of 2048x2048"):
        parse_size("2048x2048", NATIVE, 5)
    assert parse_size("32x32", NATIVE, 10**9) is None, "the model's own size has the limit of n alone"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def decoded(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("size", [(64, 64), (128, 32), (1792, 1024)])
def test_multiples_repeat_pixels(pixels: np.ndarray, size: Size) -> None:
    width, height = size
    wanted = pixels.repeat(height // 32, axis=0).repeat(width // 32, axis=1)
    assert np.array_equal(decoded(encode(pixels, "png", size=size)), wanted)


@pytest.mark.parametrize("size", [(48, 48), (64, 48), (16, 16), (31, 500)])
def test_other_sizes_are_lanczos(pixels: np.ndarray, size: Size) -> None:
    wanted = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    assert np.array_equal(decoded(encode(pixels, "png", size=size)), np.asarray(wanted))
