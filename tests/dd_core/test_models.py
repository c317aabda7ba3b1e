"""Architectures against the published sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dd_core.codebook import lookup, nearest
from dd_core.models.adapters import (
    Adapted,
    adapt_llamagen_gpt,
    adapt_llamagen_vq,
    adapt_var,
    adapt_var_dd,
    adapt_var_vqvae,
    load_strictly,
)
from dd_core.models.build import on_meta
from dd_core.models.config import LlamaGenConfig, MultiScaleConfig, VARConfig, VQConfig
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.models.vq import VQTokenizer

SHAPES = Path(os.environ.get("DD_SHAPES") or Path(__file__).parents[2].parent / "shared")


_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_GPT = {
    "B": LlamaGenConfig(layers=12, heads=12, dim=768),
    "L": LlamaGenConfig(layers=24, heads=16, dim=1024),
    "XL": LlamaGenConfig(layers=36, heads=20, dim=1280),
    "XXL": LlamaGenConfig(layers=48, heads=24, dim=1536),
    "3B": LlamaGenConfig(layers=24, heads=32, dim=3200),
}
_TEXT = replace(_GPT["XL"], text_tokens=120, text_dim=2048)


def _teacher(cfg: VARConfig) -> VARTeacher:
    tokenizer = MultiScaleVQ(MultiScaleConfig(channels=32, channel_multipliers=(1,), sides=cfg.sides))
    return VARTeacher(cfg, tokenizer.next_inputs)


def _vqvae(sides: tuple[int, ...] = MultiScaleConfig().sides) -> MultiScaleVQ:
    return MultiScaleVQ(MultiScaleConfig(sides=sides))


@dataclass(frozen=True)
class Size:
    """A published size: how it is built, its parameters, and its keys' way into ours.

    `quoted` is the rounded number that the paper gives for a student.
    """

    build: Callable[[], nn.Module]
    parameters: int
    adapter: Callable[[dict[str, Tensor]], Adapted]
    quoted: float = 0.0


def _var(depth: int) -> VARConfig:
    return VARConfig.of_depth(depth)


_D36 = replace(_var(36), sides=_512, shared_adaln=True)
_VAE = partial(adapt_var_vqvae, levels=5)
PUBLISHED = {
    "vae_ch160v4096z32@256": Size(_vqvae, 108_948_355, _VAE),
    "vae_ch160v4096z32@512": Size(lambda: _vqvae(_512), 108_948_355, _VAE),
    "VAR-d16@256": Size(lambda: _teacher(_var(16)), 310_283_520, adapt_var),
    "VAR-d20@256": Size(lambda: _teacher(_var(20)), 600_917_136, adapt_var),
    "VAR-d24@256": Size(lambda: _teacher(_var(24)), 1_033_399_360, adapt_var),
    "VAR-d30@256": Size(lambda: _teacher(_var(30)), 2_010_020_356, adapt_var),
    "VAR-d36-s@512": Size(lambda: _teacher(_D36), 2_353_893_904, adapt_var),
    # Quoted as 327M: one of the 17 layerwise layers less would be 327.1M, so this is what to look at
    # when the published file is loaded.
    "VAR-DD-d16@256": Size(lambda: VARStudent(_var(16)), 328_165_664, adapt_var_dd, 327e6),
    "VAR-DD-d20@256": Size(lambda: VARStudent(_var(20)), 635_399_088, adapt_var_dd, 635e6),
    "VAR-DD-d24@256": Size(lambda: VARStudent(_var(24)), 1_092_478_560, adapt_var_dd, 1.09e9),
    "VQ-16": Size(lambda: VQTokenizer(VQConfig()), 71_883_403, adapt_llamagen_vq),
    "VQ-8": Size(
        lambda: VQTokenizer(VQConfig(channel_multipliers=(1, 2, 2, 4))), 70_109_835, adapt_llamagen_vq
    ),
    "c2i GPT-B": Size(lambda: LlamaGenTeacher(_GPT["B"]), 110_888_448, adapt_llamagen_gpt),
    "c2i GPT-L": Size(lambda: LlamaGenTeacher(_GPT["L"]), 342_910_976, adapt_llamagen_gpt),
    "c2i GPT-XL": Size(lambda: LlamaGenTeacher(_GPT["XL"]), 774_699_520, adapt_llamagen_gpt),
    "c2i GPT-XXL": Size(lambda: LlamaGenTeacher(_GPT["XXL"]), 1_410_972_672, adapt_llamagen_gpt),
    "c2i GPT-3B": Size(lambda: LlamaGenTeacher(_GPT["3B"]), 3_096_659_200, adapt_llamagen_gpt),
    "t2i GPT-XL@256": Size(lambda: LlamaGenTeacher(_TEXT), 777_678_080, adapt_llamagen_gpt),
    "t2i GPT-XL@512": Size(lambda: LlamaGenTeacher(replace(_TEXT, grid=32)), 777_678_080, adapt_llamagen_gpt),
    "DD c2i GPT-B": Size(lambda: LlamaGenStudent(_GPT["B"]), 98_321_672, adapt_llamagen_gpt, 98.3e6),
    "DD c2i GPT-L": Size(lambda: LlamaGenStudent(_GPT["L"]), 326_155_272, adapt_llamagen_gpt, 326e6),
    "DD c2i GPT-XL": Size(lambda: LlamaGenStudent(_GPT["XL"]), 753_754_888, adapt_llamagen_gpt),
    "DD t2i GPT-XL": Size(lambda: LlamaGenStudent(_TEXT), 756_733_448, adapt_llamagen_gpt, 756e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    """To the last parameter; and as the paper rounds its students' sizes."""
    size = PUBLISHED[name]
    with on_meta():
        model = size.build()
    # LlamaGen keeps the learned states for no text among its buffers.
    assert sum(p.numel() for p in model.parameters()) == size.parameters
    if size.quoted:
        assert size.parameters == pytest.approx(size.quoted, rel=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_and_shapes_load_strictly(name: str) -> None:
    """Every key of the released modules, through our adapters, into ours: none missing, none left."""
    path = SHAPES / "published_shapes.json"
    if not path.exists():
        pytest.skip("no list of the released modules' shapes here: DD_SHAPES names its folder")
    told = json.loads(path.read_text(encoding="utf-8"))
    assert {label.partition(" (")[0] for label in told["shapes"]} == set(PUBLISHED)
    label = next(label for label in told["shapes"] if label.partition(" (")[0] == name)
    assert told["n_params"][label] == PUBLISHED[name].parameters
    with on_meta():
        model = PUBLISHED[name].build()
        state = {
            key: torch.empty(shape, dtype=getattr(torch, dtype))
            for key, (shape, dtype, _) in told["shapes"][label].items()
        }
    adapted = PUBLISHED[name].adapter(state)
    load_strictly(model, adapted.state, name)
    buffers = {key for key, (_, _, kind) in told["shapes"][label].items() if kind == "buffer"}
    assert set(adapted.ignored) <= buffers, "a learned tensor was ignored"
    if isinstance(model, VARStudent | VARTeacher):
        # The derived buffers have the sizes of what is ignored.
        level = model.level_S if isinstance(model, VARStudent) else model.level_L
        assert list(level[None].shape) == told["shapes"][label]["lvl_1L"][0]
        mask = [1, 1, *model.mask_SS.shape]
        assert mask == told["shapes"][label]["attn_bias_for_masking"][0]


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
