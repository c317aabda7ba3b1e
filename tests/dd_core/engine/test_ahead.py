"""Noise that was begun is the noise that is asked for, and is made once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dd_core.engine import ahead
from dd_core.engine.ahead import NoiseAhead
from dd_core.layout import TokenLayout
from dd_core.noise import Key, NoiseKey, Splice, batch_noise

LAYOUT = TokenLayout((1, 4, 9))
KEYS = [*NoiseKey.of_seed(3, 5), NoiseKey(3, 0, (Splice(1, 9, 2),)), NoiseKey(3, 1)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """The keys of noise that was really made."""
    found: list[Key] = []

    def counted(keys: Sequence[Key], layout: TokenLayout, code_dim: int) -> tuple[Tensor, Tensor]:
        found.extend(keys)
        return batch_noise(keys, layout, code_dim)

    monkeypatch.setattr(ahead, "batch_noise", counted)
    return found


@pytest.mark.parametrize("begun", [KEYS, KEYS[:2], []])
def test_what_is_taken_is_the_images_noise(begun: list[NoiseKey], made: list[Key]) -> None:
    """Begun or not, and the same image twice: a variation has noise of its own."""
    noise = NoiseAhead(LAYOUT, 8, threads=2)
    noise.begin(begun)
    for found, expected in zip(noise.take(KEYS), batch_noise(KEYS, LAYOUT, 8), strict=True):
        assert torch.equal(found, expected)
    assert sorted(map(repr, made)) == sorted({repr(key) for key in KEYS}), "each once"


def test_noise_of_images_that_never_come_is_forgotten(made: list[Key]) -> None:
    noise = NoiseAhead(LAYOUT, 8, threads=1, most=3)
    noise.begin(NoiseKey.of_seed(1, 10))
    assert len(noise._made) == 3
    keys = NoiseKey.of_seed(1, 5)
    for found, expected in zip(noise.take(keys), batch_noise(keys, LAYOUT, 8), strict=True):
        assert torch.equal(found, expected)
