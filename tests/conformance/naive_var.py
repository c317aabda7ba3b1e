"""VAR and VAR-DD, slow and literal: see `tests.conformance.naive`.

Shapes: B batch, K scales, p side of a scale, L = Σ p² tokens, S positions, C code dimension, V codebook
size, D model width, H heads. `v` are the tokenizer's weights, `w` a transformer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.conformance.naive import (
    Margins,
    Weights,
    apply,
    attend,
    convolve,
    final_layer,
    gelu,
    largest,
    layer_norm,
    linear,
    nearest,
    silu,
)

# Scales 2 and 7 of ten lie between two ticks; the reference's rounding made it so.
_PHI_OF_TEN = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)


@dataclass(frozen=True)
class Shape:
    """What the weights do not say."""

    sides: tuple[int, ...]
    heads: int
    depth: int
    unit_length: bool = True


def phi_of(scale: int, scales: int) -> int:
    """Which of the four convolutions a scale uses."""
    if scales == 10:
        return _PHI_OF_TEN[scale]
    distances = [abs(tick - scale / (scales - 1)) for tick in np.linspace(1 / 12, 11 / 12, 4)]
    return distances.index(min(distances))


def bounds(sides: Sequence[int], scale: int) -> slice:
    """The tokens of a scale."""
    first = sum(p * p for p in sides[:scale])
    return slice(first, first + sides[scale] ** 2)


def levels_of(sides: Sequence[int]) -> list[int]:
    """The scale of every token."""
    return [k for k, p in enumerate(sides) for _ in range(p * p)]


# Tokenizer


def _cubic(distance: float) -> float:
    a, d = -0.75, abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def bicubic(x: Tensor, side: int) -> Tensor:
    """Keys' cubic with half-pixel centres; beyond the border its pixels repeat."""
    n = x.shape[-1]
    weight = torch.zeros(side, n, dtype=x.dtype)
    for i in range(side):
        place = (i + 0.5) * n / side - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            weight[i, min(max(j, 0), n - 1)] += _cubic(place - j)
    return torch.einsum("iy,jx,bcyx->bcij", weight, weight, x)


def area(x: Tensor, side: int) -> Tensor:
    """Every output pixel is the mean of the input pixels that it touches."""
    n = x.shape[-1]
    spans = [slice(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    rows = [torch.stack([x[:, :, a, b].mean((2, 3)) for b in spans], -1) for a in spans]
    return torch.stack(rows, -2)


def grid(x_BSC: Tensor) -> Tensor:
    """`[B, p², C]` → `[B, C, p, p]`."""
    side = math.isqrt(x_BSC.shape[1])
    return x_BSC.transpose(1, 2).reshape(len(x_BSC), -1, side, side)


def flat(x_BCpp: Tensor) -> Tensor:
    return x_BCpp.reshape(*x_BCpp.shape[:2], -1).transpose(1, 2)


def contribution(v: Weights, sides: Sequence[int], codes_BSC: Tensor, scale: int) -> Tensor:
    """What a scale adds to f̂: upsampled (but for the last scale), then half itself, half convolved."""
    h = grid(codes_BSC)
    if scale < len(sides) - 1:
        h = bicubic(h, sides[-1])
    name = f"quantize.quant_resi.qresi_ls.{phi_of(scale, len(sides))}"
    return 0.5 * h + 0.5 * convolve(v, name, h)


def f_hat(v: Weights, sides: Sequence[int], codes_BLC: Tensor, scales: int) -> Tensor:
    """The sum over the first `scales` scales."""
    parts = [contribution(v, sides, codes_BLC[:, bounds(sides, k)], k) for k in range(scales)]
    return torch.stack(parts).sum(0)


def lookup(v: Weights, tokens: Tensor) -> Tensor:
    return v["quantize.embedding.weight"][tokens]


def next_input(v: Weights, sides: Sequence[int], tokens_BL: Tensor, scale: int) -> Tensor:
    """What the teacher reads for a scale ≥ 1, as a grid."""
    return area(f_hat(v, sides, lookup(v, tokens_BL), scale), sides[scale])


def _middle(part: str) -> list[tuple[str, str]]:
    return [
        ("res", f"{part}.mid.block_1"),
        ("attn", f"{part}.mid.attn_1"),
        ("res", f"{part}.mid.block_2"),
    ]


def encoder(levels: int, blocks: int) -> list[tuple[str, str]]:
    ops = [("conv", "encoder.conv_in")]
    for level in range(levels):
        for i in range(blocks):
            ops.append(("res", f"encoder.down.{level}.block.{i}"))
            if level == levels - 1:
                ops.append(("attn", f"encoder.down.{level}.attn.{i}"))
        if level < levels - 1:
            ops.append(("down", f"encoder.down.{level}.downsample.conv"))
    return [*ops, *_middle("encoder"), ("tail", "encoder.conv_out"), ("conv", "quant_conv")]


def decoder(levels: int, blocks: int) -> list[tuple[str, str]]:
    """`up` counts resolutions from the highest; the lowest runs first."""
    ops = [("conv", "post_quant_conv"), ("conv", "decoder.conv_in"), *_middle("decoder")]
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            ops.append(("res", f"decoder.up.{level}.block.{i}"))
            if level == levels - 1:
                ops.append(("attn", f"decoder.up.{level}.attn.{i}"))
        if level > 0:
            ops.append(("up", f"decoder.up.{level}.upsample.conv"))
    return [*ops, ("tail", "decoder.conv_out")]


def image_of(v: Weights, operations: list[tuple[str, str]], total: Tensor) -> Tensor:
    """f̂ → image in [−1, 1], clamped."""
    return apply(v, operations, total).clamp(-1, 1)


def quantise(v: Weights, sides: Sequence[int], f: Tensor, margins: Margins) -> tuple[Tensor, list[Tensor]]:
    """Feature map → tokens and f̂ after each scale, by subtracting from the rest."""
    rest, total, tokens, maps = f.clone(), torch.zeros_like(f), [], []
    for k, side in enumerate(sides):
        small = rest if k == len(sides) - 1 else area(rest, side)
        tokens.append(nearest(v["quantize.embedding.weight"], flat(small), margins))
        added = contribution(v, sides, lookup(v, tokens[-1]), k)
        rest, total = rest - added, total + added
        maps.append(total)
    return torch.cat(tokens, 1), maps


# Transformers


def _attention(w: Weights, shape: Shape, name: str, x: Tensor, allowed: Tensor) -> Tensor:
    zero = torch.zeros_like(w[f"{name}.q_bias"])
    qkv = linear(w, f"{name}.mat_qkv", x) + torch.cat([w[f"{name}.q_bias"], zero, w[f"{name}.v_bias"]])
    b, s, _ = x.shape
    q, k, v = (t.reshape(b, s, shape.heads, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
    scale = 0.25 / math.sqrt(q.shape[-1])
    if shape.unit_length:
        q = q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        q = q * torch.exp(w[f"{name}.scale_mul_1H11"].clamp(max=math.log(100)))
        scale = 1.0
    out = attend(q, k, v, allowed, scale)
    return linear(w, f"{name}.proj", out.transpose(1, 2).reshape(b, s, -1))


def _block(
    w: Weights, shape: Shape, i: int, x: Tensor, cond: Tensor, allowed: Tensor, e: Tensor | None = None
) -> Tensor:
    name, width = f"blocks.{i}", x.shape[-1]
    if "shared_ada_lin.1.weight" in w:
        six = w[f"{name}.ada_gss"][0] + linear(w, "shared_ada_lin.1", silu(cond)).reshape(-1, 6, width)
    else:
        six = linear(w, f"{name}.ada_lin.1", silu(cond)).reshape(-1, 6, width)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (six[:, j : j + 1] for j in range(6))
    x = x + gamma1 * _attention(w, shape, f"{name}.attn", layer_norm(x) * (1 + scale1) + shift1, allowed)
    if e is not None:
        x = x + linear(w, f"layerwise_n_d_embed.{i}", e)
    h = gelu(linear(w, f"{name}.ffn.fc1", layer_norm(x) * (1 + scale2) + shift2))
    return x + gamma2 * linear(w, f"{name}.ffn.fc2", h)


def _logits(w: Weights, x: Tensor, cond: Tensor) -> Tensor:
    two = linear(w, "head_nm.ada_lin.1", silu(cond)).reshape(len(x), 2, -1)
    scale, shift = two[:, :1], two[:, 1:]
    return linear(w, "head", layer_norm(x) * (1 + scale) + shift)


def teacher(
    w: Weights, v: Weights, shape: Shape, tokens_BL: Tensor, labels: Tensor, stop: int, unmasked: int = 0
) -> Tensor:
    """Logits of the scales before `stop`, given the tokens of the scales before `stop − 1`.

    Args:
        unmasked: scales 0 to this one were read in one pass without a mask, as the released
            hybrid script does; they all see each other.
    """
    cond = w["class_emb.weight"][labels]
    start = (cond + w["pos_start"][0, 0])[:, None]
    read = [flat(next_input(v, shape.sides, tokens_BL, k)) for k in range(1, stop)]
    x = torch.cat([start, *(linear(w, "word_embed", given) for given in read)], 1)
    level = levels_of(shape.sides[:stop])
    x = x + w["lvl_embed.weight"][level] + w["pos_1LC"][:, : len(level)]
    group = [max(k, unmasked) for k in level]
    allowed = torch.tensor([[group[j] <= group[i] for j in range(len(level))] for i in range(len(level))])
    for i in range(shape.depth):
        x = _block(w, shape, i, x, cond, allowed)
    return _logits(w, x, cond)


def guided(conditional: Tensor, unconditional: Tensor, sides: Sequence[int], cfg: float) -> Tensor:
    """Scale by scale: t = cfg·k/(K − 1), (1 + t)·c − t·u. Works on the first scales too."""
    made = []
    for k in range(len(sides)):
        place = bounds(sides, k)
        if place.start < conditional.shape[1]:
            t = cfg * k / (len(sides) - 1)
            made.append((1 + t) * conditional[:, place] - t * unconditional[:, place])
    return torch.cat(made, 1)


def student_allowed(sides: Sequence[int]) -> Tensor:
    """Earlier scales and itself; the class token is a level of its own."""
    level = [-1, *levels_of(sides)]
    size = range(len(level))
    return torch.tensor([[level[j] < level[i] or i == j for j in size] for i in size])


def data_tokens(sides: Sequence[int], step: int) -> int:
    return sum(p * p for p in sides[:step])


def student(
    w: Weights, shape: Shape, x_BLC: Tensor, labels: Tensor, steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, L, C]` and logits `[B, L, V]`; `steps` holds each sample's own step."""
    cond = w["class_emb.weight"][labels]
    noise_row, data_row = w["n_d_embed.weight"]
    e = noise_row.repeat(len(x_BLC), 1 + x_BLC.shape[1], 1)
    for b, step in enumerate(steps):
        e[b, : 1 + data_tokens(shape.sides, step)] = data_row
    x = torch.cat([(cond + w["pos_start"][0, 0])[:, None], linear(w, "word_embed", x_BLC)], 1)
    level = [0, *(k + 1 for k in levels_of(shape.sides))]
    x = x + w["lvl_embed.weight"][level] + w["pos_1LC"] + e
    for i in range(shape.depth):
        x = _block(w, shape, i, x, cond, student_allowed(shape.sides), e)
    x = x + linear(w, f"layerwise_n_d_embed.{shape.depth}", e)
    return final_layer(w, x, cond)[:, 1:], _logits(w, x, cond)[:, 1:]


def jump(
    w: Weights,
    codebook_VC: Tensor,
    shape: Shape,
    x_BLC: Tensor,
    labels: Tensor,
    step: int,
    split: int,
    margins: Margins,
) -> Tensor:
    """Data stays; before the split: codes of the largest logits; after it: embeddings."""
    embeddings, logits = student(w, shape, x_BLC, labels, [step] * len(x_BLC))
    out = embeddings.clone()
    first, known = data_tokens(shape.sides, split), data_tokens(shape.sides, step)
    out[:, :first] = codebook_VC[largest(logits[:, :first], margins)]
    out[:, :known] = x_BLC[:, :known]
    return out
