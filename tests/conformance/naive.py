"""The reference's behaviour once more: slow, literal and in float64. What both families share.

Recorded fixtures must not come from the code that is checked against them. So nothing here imports
`dd_core`: layers are written out, sequences are whole (no cache, explicit masks), the nearest code is
found by explicit differences, and filters sort Python lists. Weights carry the reference's own keys.

Shapes: B batch, S positions, C channels, H heads, E head dimension, V codebook size, h w pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Row = list[float]


@dataclass
class Margins:
    """How clear the closest decision was; a recording with near-ties would make the check flaky.

    Args:
        choice: smallest lead of a largest logit, a nearest code or a k-th value over the next.
        mass: smallest distance of a cumulated probability from a threshold of top-p.
    """

    choice: float = math.inf
    mass: float = math.inf

    def chosen(self, lead: float) -> None:
        self.choice = min(self.choice, lead)

    def cumulated(self, distance: float) -> None:
        self.mass = min(self.mass, abs(distance))


def double(state: Weights) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


# Layers of the transformers


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, w[f"{name}.weight"])
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """The tanh form."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.max(-1, keepdim=True).values)
    return powers / powers.sum(-1, keepdim=True)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """`[B, H, S, E]` each, query by query; `allowed` is `[S, S]` or `[B, S, S]`."""
    out = torch.zeros_like(q)
    allowed = allowed.expand(len(q), *allowed.shape[-2:])
    for i in range(q.shape[2]):
        scores = scale * torch.einsum("bhe,bhje->bhj", q[:, :, i], k)
        scores = torch.where(allowed[:, None, i], scores, -math.inf)
        out[:, :, i] = torch.einsum("bhj,bhje->bhe", softmax(scores), v)
    return out


def final_layer(w: Weights, h_BSD: Tensor, cond_BD: Tensor) -> Tensor:
    """The students' embedding head: row 0 of the table is the shift, row 1 the scale."""
    table = w["final_layer_conti.scale_shift_table"]
    shift, scale = table[0] + cond_BD, table[1] + cond_BD
    return linear(w, "final_layer_conti.linear", layer_norm(h_BSD) * (1 + scale[:, None]) + shift[:, None])


# Autoencoders: a list of operations by key, in order of execution


def convolve(w: Weights, name: str, x: Tensor, pad: tuple[int, int] = (1, 1), stride: int = 1) -> Tensor:
    """The sum over a kernel's taps; `pad` zeros before and after, in both directions."""
    weight, (before, after) = w[f"{name}.weight"], pad
    b, c, h, width = x.shape
    padded = x.new_zeros(b, c, h + before + after, width + before + after)
    padded[:, :, before : before + h, before : before + width] = x
    size = weight.shape[-1]
    high, wide = ((n - size) // stride + 1 for n in padded.shape[2:])
    total = w[f"{name}.bias"][None, :, None, None].repeat(b, 1, high, wide)
    for dy in range(size):
        for dx in range(size):
            seen = padded[:, :, dy : dy + stride * (high - 1) + 1 : stride]
            seen = seen[:, :, :, dx : dx + stride * (wide - 1) + 1 : stride]
            total += torch.einsum("bchw,oc->bohw", seen, weight[:, :, dy, dx])
    return total


def pointwise(w: Weights, name: str, x: Tensor) -> Tensor:
    return convolve(w, name, x, pad=(0, 0))


def group_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """32 groups of channels, eps 1e-6, then a weight and a bias a channel."""
    groups = x.reshape(len(x), 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    normal = (centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)).reshape(x.shape)
    return normal * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def residual(w: Weights, name: str, x: Tensor) -> Tensor:
    h = convolve(w, f"{name}.conv1", silu(group_norm(w, f"{name}.norm1", x)))
    h = convolve(w, f"{name}.conv2", silu(group_norm(w, f"{name}.norm2", h)))
    return h + (pointwise(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def pixel_attention(w: Weights, name: str, x: Tensor) -> Tensor:
    """One head over all pixels; q, k and v from one convolution (VAR) or from three (LlamaGen)."""
    n = group_norm(w, f"{name}.norm", x)
    if f"{name}.qkv.weight" in w:
        q, k, v = pointwise(w, f"{name}.qkv", n).chunk(3, 1)
    else:
        q, k, v = (pointwise(w, f"{name}.{part}", n) for part in "qkv")
    q, k, v = (t.reshape(*t.shape[:2], -1).transpose(1, 2)[:, None] for t in (q, k, v))
    everything = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    out = attend(q, k, v, everything, x.shape[1] ** -0.5)
    return x + pointwise(w, f"{name}.proj_out", out[:, 0].transpose(1, 2).reshape(x.shape))


def apply(w: Weights, operations: Iterable[tuple[str, str]], x: Tensor) -> Tensor:
    """Runs `(what, key)` one after another."""
    for what, key in operations:
        if what == "conv":
            x = convolve(w, key, x)
        elif what == "res":
            x = residual(w, key, x)
        elif what == "attn":
            x = pixel_attention(w, key, x)
        elif what == "down":  # zeros on the right and at the bottom only
            x = convolve(w, key, x, pad=(0, 1), stride=2)
        elif what == "up":  # nearest neighbour, then a convolution
            x = convolve(w, key, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        elif what == "tail":
            part = key.rpartition(".")[0]
            x = convolve(w, key, silu(group_norm(w, f"{part}.norm_out", x)))
        else:
            raise ValueError(what)
    return x


# Choices


def nearest(codebook_VC: Tensor, x: Tensor, margins: Margins) -> Tensor:
    """`[..., C]` → `[...]`: all differences, all squares, the smallest sum."""
    found = []
    for vector in x.reshape(-1, x.shape[-1]):
        distances = [float(((vector - code) ** 2).sum()) for code in codebook_VC]
        best, second = sorted(distances)[:2]
        # A code's own index is given and not decided: two equal codes would be no near-tie.
        margins.chosen(second - best)
        found.append(distances.index(best))
    return torch.tensor(found, dtype=torch.long).reshape(x.shape[:-1])


def largest(logits: Tensor, margins: Margins) -> Tensor:
    """`[..., V]` → `[...]`."""
    found = []
    for row in logits.reshape(-1, logits.shape[-1]).tolist():
        best, second = sorted(row)[:-3:-1]
        margins.chosen(best - second)
        found.append(row.index(best))
    return torch.tensor(found, dtype=torch.long).reshape(logits.shape[:-1])


def _probabilities(row: Row) -> Row:
    powers = [math.exp(v - max(row)) for v in row]
    return [p / sum(powers) for p in powers]


def _top_k(row: Row, top_k: int, margins: Margins) -> Row:
    """Everything that is at least the k-th value stays, ties too."""
    if not 0 < top_k < len(row):
        return row
    kth = sorted(row, reverse=True)[top_k - 1]
    margins.chosen(kth - max((v for v in row if v < kth), default=-math.inf))
    return [v if v >= kth else -math.inf for v in row]


def keep_var(row: Row, top_k: int, top_p: float, margins: Margins) -> Row:
    """VAR: ascending, dropped while the cumulated mass is at most 1 − p; the largest always stays."""
    row = _top_k(row, top_k, margins)
    if not 0 < top_p < 1:
        return row
    p, mass = _probabilities(row), 0.0
    order = sorted(range(len(row)), key=lambda i: row[i])
    for i in order[:-1]:
        mass += p[i]
        if p[i] > 0:
            margins.cumulated(mass - (1 - top_p))
        if mass <= 1 - top_p:
            row = [*row[:i], -math.inf, *row[i + 1 :]]
    return row


def keep_llamagen(row: Row, top_k: int, top_p: float, margins: Margins) -> Row:
    """LlamaGen: descending, dropped after the cumulated mass has passed p; the crossing token stays."""
    row = _top_k(row, top_k, margins)
    if top_p >= 1:
        return row
    p, mass, passed = _probabilities(row), 0.0, False
    for i in sorted(range(len(row)), key=lambda i: -row[i]):
        if passed:
            row = [*row[:i], -math.inf, *row[i + 1 :]]
        mass += p[i]
        if row[i] > -math.inf and mass < 1 - 1e-9:
            margins.cumulated(mass - top_p)
        passed = passed or mass > top_p
    return row


def draw(kept: Tensor, rng: random.Random) -> Tensor:
    """Filtered logits `[..., V]` → drawn indices `[...]`."""
    rows = kept.reshape(-1, kept.shape[-1]).tolist()
    drawn = [rng.choices(range(len(row)), _probabilities(row))[0] for row in rows]
    return torch.tensor(drawn).reshape(kept.shape[:-1])
