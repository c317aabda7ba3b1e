"""The noise of an image follows from its key alone; a variation shares the noise of its first blocks."""

from __future__ import annotations

import pytest
import torch

from dd_core.layout import TokenLayout
from dd_core.noise import NoiseKey, Splice, batch_noise, gaussian_noise

PINNED = [0.1491466, -0.9210876, 0.5345121]


def test_noise_belongs_to_seed_and_index() -> None:
    """Pinned numbers: another generator, or another key, would change everyone's images."""
    noise = gaussian_noise(7, 0, 64, 8)
    assert noise.flatten()[:3].tolist() == pytest.approx(PINNED, abs=1e-6)
    assert not torch.equal(noise, gaussian_noise(7, 1, 64, 8))
    assert not torch.equal(noise, gaussian_noise(8, 0, 64, 8))
    many = torch.stack([gaussian_noise(s, 0, 64, 8) for s in range(200)])
    assert abs(many.mean().item()) < 0.01 and abs(many.std().item() - 1) < 0.01


def test_a_splice_is_counted_in_blocks_of_the_layout() -> None:
    """Block 2 of (1, 4, 9) begins at token 5; of two splices the later block has the last word."""
    layout = TokenLayout((1, 4, 9))
    keys = [NoiseKey(7, 0, (Splice(1, 8, 2), Splice(2, 9, 3))), (7, 0), (8, 2), (9, 3)]
    for noise in batch_noise(keys, layout, 3):
        assert torch.equal(noise[0], torch.cat([noise[1, :1], noise[2, 1:5], noise[3, 5:]]))


def test_a_variation_keeps_the_splices_before_its_block() -> None:
    first = NoiseKey(7, 0)
    second = first.spliced(20, 8, 2)
    third = second.spliced(40, 9, 1)
    assert third == NoiseKey(7, 0, (Splice(20, 8, 2), Splice(40, 9, 1)))
    assert third.spliced(20, 5, 6) == NoiseKey(7, 0, (Splice(20, 5, 6),))
    assert third.spliced(30, 5, 6) == NoiseKey(7, 0, (Splice(20, 8, 2), Splice(30, 5, 6)))
    assert [(k.newest.seed, k.newest.index) for k in (first, second, third)] == [(7, 0), (8, 2), (9, 1)]
    assert NoiseKey.of_seed(7, 2) == (first, NoiseKey(7, 1))
