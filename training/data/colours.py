"""The main colour of a picture: its hue, and the word for it.

    pixels ─▶ hue, weighted by chroma ─▶ histogram ─▶ where most of it lies ─▶ "red", "brown", …

Shapes: N pictures, H W pixels, F bins of hue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BINS = 36
# Less of a picture that is coloured, or less chroma, and it counts as grey: both are at most 1.
_COLOURED, _CHROMA = 0.03, 0.15
# A word is for a colour that this share of all pixels has, and this share of what is coloured at all.
_SHOWN, _ALONE, _NEAR = 0.15, 0.6, 30.0
# Hue in degrees, where the next word begins.
_WORDS = ((14, "red"), (37, "orange"), (68, "yellow"), (165, "green"), (258, "blue"), (292, "purple"),
          (343, "pink"), (360, "red"))  # fmt: skip
_BROWN = {"orange": 0.75, "red": 0.55}  # what is called brown with a brightest channel below this


def main_hue(image_NHW3: Tensor) -> Tensor:
    """Hue `[N]` of each uint8 picture's main colour, in degrees; NaN where a picture is grey.

    The hexagonal hue of its pixels, weighted by their chroma, where most of the weight lies.
    """
    hue_NP, chroma_NP, _ = _hexagonal(image_NHW3)
    return _main_of(hue_NP, chroma_NP)


def turn(hue: Tensor, other: Tensor) -> Tensor:
    """Degrees between hues, the shorter way round; NaN where one is."""
    apart = (hue - other).abs()
    return torch.minimum(apart, 360 - apart)


def _main_of(hue_NP: Tensor, chroma_NP: Tensor) -> Tensor:
    """Main hue `[N]` of pixels' hues in degrees and their chroma; NaN where next to none is coloured."""
    # Bins are around their hue: noise about 0° must not halve red's weight.
    place = (hue_NP * (_BINS / 360)).round().long() % _BINS
    weight = chroma_NP.where(chroma_NP >= _CHROMA, 0.0)
    histogram_NF = torch.zeros(len(hue_NP), _BINS).scatter_add_(1, place, weight)
    smooth_NF = F.conv1d(
        F.pad(histogram_NF[:, None], (2, 2), mode="circular"), torch.tensor([[[1.0, 2.0, 3.0, 2.0, 1.0]]])
    )[:, 0]
    hue_N = smooth_NF.argmax(1) * (360 / _BINS)
    return hue_N.where((weight > 0).float().mean(1) >= _COLOURED, torch.nan)


def colour_words(image_NHW3: Tensor) -> list[str]:
    """The word for each uint8 picture's main colour; "" where it is grey, or of several colours."""
    hue_NP, chroma_NP, high_NP = _hexagonal(image_NHW3)
    coloured = chroma_NP >= _CHROMA
    main_N = _main_of(hue_NP, chroma_NP)
    near = coloured & (turn(hue_NP, main_N[:, None]) <= _NEAR)
    share = near.float().mean(1)
    plain = (share >= _SHOWN) & (share >= _ALONE * coloured.float().mean(1))  # False for NaN
    bright = (high_NP * near).sum(1) / near.sum(1).clamp(min=1)
    return [
        _word(hue, light) if shown else ""
        for hue, light, shown in zip(main_N.tolist(), bright.tolist(), plain.tolist(), strict=True)
    ]


def _word(hue: float, light: float) -> str:
    word = next(word for end, word in _WORDS if hue < end)
    return "brown" if light < _BROWN.get(word, 0.0) else word


def _hexagonal(image_NHW3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in degrees, chroma and the brightest channel of each pixel, `[N, H·W]` each."""
    rgb = image_NHW3.flatten(1, 2).float() / 255
    high, low = rgb.amax(-1), rgb.amin(-1)
    chroma = high - low
    red, green, blue = rgb.unbind(-1)
    sector = torch.where(
        high == red,
        (green - blue) / chroma.clamp(min=1e-6),
        torch.where(
            high == green,
            2 + (blue - red) / chroma.clamp(min=1e-6),
            4 + (red - green) / chroma.clamp(min=1e-6),
        ),
    )
    return sector.remainder(6) * 60, chroma, high
