"""Architectures against the published sizes."""

from __future__ import annotations

import pytest
import torch

from dd_core.codebook import lookup, nearest
from dd_core.models.config import GPTConfig, VQConfig
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.vq import VQTokenizer


@pytest.mark.parametrize(
    ("cfg", "teacher", "student"),
    [
        (GPTConfig(layers=12, heads=12, dim=768), 110_888_448, 98_321_672),
        (GPTConfig(layers=24, heads=16, dim=1024), 342_910_976, 326_155_272),
    ],
)
def test_published_parameter_counts(cfg: GPTConfig, teacher: int, student: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in LlamaGenTeacher(cfg).parameters()) == teacher
        assert sum(p.numel() for p in LlamaGenStudent(cfg).parameters()) == student


def test_published_tokenizer_sizes() -> None:
    with torch.device("meta"):
        vq16 = VQTokenizer(VQConfig())
        vq8 = VQTokenizer(VQConfig(channel_multipliers=(1, 2, 2, 4)))
    assert sum(p.numel() for p in vq16.parameters()) == 71_883_403
    assert sum(p.numel() for p in vq8.parameters()) == 70_109_835


def test_nearest_equals_the_full_difference() -> None:
    codes, x = torch.randn(50, 8), torch.randn(3, 20, 8)
    full = (x[:, :, None] - codes).square().sum(-1).argmin(-1)
    assert torch.equal(nearest(codes, x), full)
    assert torch.equal(nearest(codes, lookup(codes, full)), full)


def test_tokenizer_round_trip_shapes_and_unit_codes() -> None:
    tokenizer = VQTokenizer(VQConfig(64, 4, 32, 32, (1, 1, 1), 1))
    tokens = tokenizer.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert tokens.shape == (2, 64) and tokenizer.decode_tokens(tokens).shape == (2, 3, 32, 32)
    assert torch.allclose(tokenizer.codebook_VC.norm(dim=-1), torch.ones(64), atol=1e-6)
