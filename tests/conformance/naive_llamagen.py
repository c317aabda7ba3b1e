"""LlamaGen and LlamaGen-DD, slow and literal: see `tests.conformance.naive`.

Shapes: B batch, L tokens, P condition positions, S = P + L positions, C code dimension, V codebook
size, D model width, H heads, E head dimension, T text positions, N text state dimension.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.conformance.naive import Margins, Weights, attend, final_layer, gelu, largest, linear, silu


@dataclass(frozen=True)
class Shape:
    """What the weights do not say."""

    grid: int
    heads: int
    layers: int
    prefix: int = 1


# Tokenizer


def _middle(part: str) -> list[tuple[str, str]]:
    return [("res", f"{part}.mid.0"), ("attn", f"{part}.mid.1"), ("res", f"{part}.mid.2")]


def encoder(levels: int, blocks: int) -> list[tuple[str, str]]:
    """Without `quant_conv`, a 1×1 convolution."""
    ops = [("conv", "encoder.conv_in")]
    for level in range(levels):
        name = f"encoder.conv_blocks.{level}"
        for i in range(blocks):
            ops.append(("res", f"{name}.res.{i}"))
            if level == levels - 1:
                ops.append(("attn", f"{name}.attn.{i}"))
        if level < levels - 1:
            ops.append(("down", f"{name}.downsample.conv"))
    return [*ops, *_middle("encoder"), ("tail", "encoder.conv_out")]


def decoder(levels: int, blocks: int) -> list[tuple[str, str]]:
    """Levels are numbered in order of execution; without `post_quant_conv`, a 1×1 convolution."""
    ops = [("conv", "decoder.conv_in"), *_middle("decoder")]
    for level in range(levels):
        name = f"decoder.conv_blocks.{level}"
        for i in range(blocks + 1):
            ops.append(("res", f"{name}.res.{i}"))
            if level == 0:
                ops.append(("attn", f"{name}.attn.{i}"))
        if level < levels - 1:
            ops.append(("up", f"{name}.upsample.conv"))
    return [*ops, ("tail", "decoder.conv_out")]


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / torch.sqrt((x**2).sum(-1, keepdim=True)).clamp(min=1e-12)


# Transformers


def rotations(shape: Shape, head_dim: int) -> Tensor:
    """Complex factors `[S, E / 2]`: zero (not one) at the condition; rows turn the first half of the
    pairs, columns the second.
    """
    quarter = head_dim // 4
    table = [[0j] * (2 * quarter) for _ in range(shape.prefix)]
    for place in range(shape.grid**2):
        row, column = divmod(place, shape.grid)
        frequency = [10000 ** (-2 * j / (head_dim / 2)) for j in range(quarter)]
        table.append([cmath.exp(1j * at * f) for at in (row, column) for f in frequency])
    return torch.tensor(table, dtype=torch.complex128)


def as_pairs(table: Tensor) -> Tensor:
    """Complex factors → (cosine, sine), as the reference keeps them."""
    return torch.stack([table.real, table.imag], -1)


def _rotate(x_BHSE: Tensor, table: Tensor) -> Tensor:
    turned = torch.complex(x_BHSE[..., 0::2], x_BHSE[..., 1::2]) * table[: x_BHSE.shape[2]]
    return torch.stack([turned.real, turned.imag], -1).flatten(-2)


def _rms_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]


def trunk(w: Weights, shape: Shape, x: Tensor, allowed: Tensor) -> Tensor:
    """All layers; the result is not normalised."""
    b, s, width = x.shape
    table = rotations(shape, width // shape.heads)
    for i in range(shape.layers):
        name = f"layers.{i}"
        qkv = linear(w, f"{name}.attention.wqkv", _rms_norm(w, f"{name}.attention_norm", x))
        q, k, v = (t.reshape(b, s, shape.heads, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
        q, k = _rotate(q, table), _rotate(k, table)
        out = attend(q, k, v, allowed, (width // shape.heads) ** -0.5)
        x = x + linear(w, f"{name}.attention.wo", out.transpose(1, 2).reshape(b, s, width))
        n = _rms_norm(w, f"{name}.ffn_norm", x)
        gate = silu(linear(w, f"{name}.feed_forward.w1", n)) * linear(w, f"{name}.feed_forward.w3", n)
        x = x + linear(w, f"{name}.feed_forward.w2", gate)
    return x


def causal(size: int) -> Tensor:
    return torch.tensor([[j <= i for j in range(size)] for i in range(size)])


def class_start(w: Weights, labels: Tensor) -> Tensor:
    """One condition position, `[B, 1, D]`."""
    return w["cls_embedding.embedding_table.weight"][labels][:, None]


def text_start(w: Weights, states_BTN: Tensor) -> Tensor:
    """A condition position for each of the text's, `[B, P, D]`."""
    return linear(w, "cls_embedding.cap_proj.fc2", gelu(linear(w, "cls_embedding.cap_proj.fc1", states_BTN)))


def move_left(states_BTN: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded → left-padded: the n valid rows go to the end, the others become zero."""
    moved, mask = torch.zeros_like(states_BTN), torch.zeros_like(mask_BT)
    for b, row in enumerate(mask_BT.tolist()):
        valid = sum(row)
        moved[b, len(row) - valid :] = states_BTN[b, :valid]
        mask[b, len(row) - valid :] = 1
    return moved, mask


def text_allowed(mask_BT: Tensor, size: int) -> Tensor:
    """`[B, S, S]`: causal, no padding as a key, and always itself."""
    text = mask_BT.shape[1]
    allowed = torch.zeros(len(mask_BT), size, size, dtype=torch.bool)
    for b, mask in enumerate(mask_BT.tolist()):
        for i in range(size):
            for j in range(i + 1):
                allowed[b, i, j] = i == j or j >= text or mask[j] == 1
    return allowed


def teacher(w: Weights, shape: Shape, start: Tensor, tokens: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Logits of the tokens 0 to n, given the first n tokens: `[B, n + 1, V]`."""
    x = torch.cat([start, w["tok_embeddings.weight"][tokens]], 1)
    size = x.shape[1]
    x = trunk(w, shape, x, causal(size) if allowed is None else allowed[:, :size, :size])
    return linear(w, "output", _rms_norm(w, "norm", x[:, shape.prefix - 1 :]))


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    return unconditional + scale * (conditional - unconditional)


def student(
    w: Weights, shape: Shape, x_BLC: Tensor, labels: Tensor, steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, L, C]` and logits `[B, L, V]`; position j is data if j ≤ its sample's step."""
    start = class_start(w, labels)
    x = torch.cat([start, linear(w, "tok_embeddings", x_BLC)], 1)
    noise_row, data_row = w["n_d_embed.weight"]
    for b, step in enumerate(steps):
        for j in range(x.shape[1]):
            x[b, j] += data_row if j <= step else noise_row
    x = trunk(w, shape, x, causal(x.shape[1]))
    logits = linear(w, "output", _rms_norm(w, "norm", x))
    return final_layer(w, x, start[:, 0])[:, 1:], logits[:, 1:]


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
    out[:, :split] = codebook_VC[largest(logits[:, :split], margins)]
    out[:, :step] = x_BLC[:, :step]
    return out


def image_grid(x_BLC: Tensor) -> Tensor:
    """`[B, L, C]` → `[B, C, h, w]`, in raster order."""
    side = math.isqrt(x_BLC.shape[1])
    return x_BLC.transpose(1, 2).reshape(len(x_BLC), -1, side, side)
