"""Layers that LlamaGen's teacher and student share; attention and embedding head are VAR's as well.

Shapes: B batch, S positions (start token and tokens), D model width, H heads, E head dimension,
L tokens, C code dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.cache import KVCache
from dd_core.condition import ClassCondition, Condition, TextCondition, of_kind
from dd_core.exact import among_idle_rows, cached_sequences, with_idle_queries, with_zero_sequences
from dd_core.models.config import LlamaGenConfig, VARConfig


def attend(
    q_BHSE: Tensor,
    k_BHSE: Tensor,
    v_BHSE: Tensor,
    cache: KVCache | None,
    layer: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of the newest positions over all: `[B, S, H·E]`, an image's rounding being its own.

    Sequences beyond the cache's batch are idle: they attend to nothing, are not remembered, and come back
    as zeros.

    Args:
        mask: `[S, all]` or `[B, 1, S, all]`, True = may attend.
        causal: the newest positions are all there are, and see no later one.
    """
    batch, new = len(q_BHSE), q_BHSE.shape[2]
    if cache is not None:
        q_BHSE, k_BHSE, v_BHSE, mask = cached_sequences(cache, q_BHSE, k_BHSE, v_BHSE, mask)
        k_BHSE, v_BHSE = cache.write(layer, k_BHSE, v_BHSE)
    on_cpu = q_BHSE.device.type == "cpu"
    # Asked last: a compiled graph cannot hold the question, and a student has no cache.
    if cache is not None and on_cpu and torch.is_autocast_enabled("cpu"):
        # Autocast would round the whole cache again at every step; exact bytes are not promised under it.
        with torch.autocast("cpu", enabled=False):
            q = q_BHSE.type_as(k_BHSE)
            out = _written_out(q, k_BHSE, v_BHSE, mask, is_causal=causal, scale=scale).type_as(q_BHSE)
    else:
        q_BHSE, mask = with_idle_queries(q_BHSE, mask)
        attention = _written_out if q_BHSE.requires_grad and on_cpu else F.scaled_dot_product_attention
        out = attention(q_BHSE, k_BHSE, v_BHSE, mask, is_causal=causal, scale=scale)[:, :, :new]
    return with_zero_sequences(out.transpose(1, 2).flatten(2), batch)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float | None
) -> Tensor:
    """softmax(q kᵀ · scale) v, written out.

    For a cache in another precision than autocast's, and where gradients flow on a CPU: there the fused
    kernel's backward pass was 26% of a training step of short sequences, four times its forward pass;
    written out, a step takes 0.64 of the time.
    """
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, torch.float32).to(v.dtype) @ v


class RMSNorm(nn.Module):
    """x / rms(x) in float32, times a weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        f = x.float()
        f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + self.eps)
        return f.type_as(x) * self.weight


def rope_table(cfg: LlamaGenConfig) -> Tensor:
    """2D rotary table `[P + L, E/2, 2]` (cosine, sine); the P condition positions are all zeros.

    The first half of the pairs turns with the row of the token's grid cell, the second with
    its column. The zeros are LlamaGen's own: they make query and key of the start token the
    zero vector, so every position attends to it with score 0.
    """
    pairs = cfg.head_dim // 4
    frequency = cfg.rope_base ** (-2.0 * torch.arange(pairs, dtype=torch.float32) / (cfg.head_dim // 2))
    place = torch.arange(cfg.grid * cfg.grid)
    row = (place // cfg.grid)[:, None] * frequency
    column = (place % cfg.grid)[:, None] * frequency
    angle = torch.cat([row, column], dim=-1)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return torch.cat([table.new_zeros(cfg.prefix, *table.shape[1:]), table])


def rotate(x_BSHE: Tensor, table_SE: Tensor) -> Tensor:
    """Rotates interleaved pairs (2i, 2i + 1) by the table's angles, in float32."""
    pairs = x_BSHE.float().reshape(*x_BSHE.shape[:-1], -1, 2)
    cosine, sine = table_SE[:, None, :, 0], table_SE[:, None, :, 1]
    a, b = pairs.unbind(-1)
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1).flatten(-2).type_as(x_BSHE)


class Attention(nn.Module):
    """Causal multi-head attention; with a cache, the queries are the newest positions.

    `mask` (`[B, 1, new, all]`, True = may attend) replaces the causal one.
    """

    def __init__(self, cfg: LlamaGenConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.wqkv = nn.Linear(cfg.dim, 3 * cfg.dim, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)

    def forward(
        self, x_BSD: Tensor, rope: Tensor, cache: KVCache | None, layer: int, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.wqkv(x_BSD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)
        new, past = q.shape[2], 0 if cache is None else cache.length
        if mask is None and new > 1 and past:
            mask = torch.ones(new, past + new, dtype=torch.bool, device=q.device).tril(past)
        causal = mask is None and new > 1
        return self.wo(attend(q, k, v, cache, layer, mask=mask, causal=causal))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, cfg: LlamaGenConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.hidden, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.hidden, bias=False)
        self.w2 = nn.Linear(cfg.hidden, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h))."""

    def __init__(self, cfg: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        self.attention_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def forward(
        self, x: Tensor, rope: Tensor, cache: KVCache | None, layer: int, mask: Tensor | None = None
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), rope, cache, layer, mask)
        return h + self.feed_forward(self.ffn_norm(h))  # type: ignore[no-any-return]


class GeluFeedForward(nn.Module):
    """fc2(gelu(fc1 x)), with the tanh form of GELU: VAR's feed-forward layer, LlamaGen's of text states."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden, bias)
        self.fc2 = nn.Linear(hidden, out_dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class CaptionEmbedding(nn.Module):
    """States of a text encoder → P condition positions.

    `uncond_embedding` are the states that stand for no text. The published checkpoints keep this
    learned tensor among their buffers.
    """

    uncond_embedding: Tensor

    def __init__(self, cfg: LlamaGenConfig) -> None:
        super().__init__()
        self.cap_proj = GeluFeedForward(cfg.text_dim, cfg.dim, cfg.dim, bias=False)
        start = torch.randn(cfg.text_tokens, cfg.text_dim) / cfg.text_dim**0.5
        self.register_buffer("uncond_embedding", start)

    def forward(self, cond: Condition) -> Tensor:
        states_BTN = of_kind(cond, TextCondition).states_BTN
        return self.cap_proj(states_BTN.to(self.cap_proj.fc1.weight.dtype))  # type: ignore[no-any-return]

    def visible(self, cond: Condition) -> Tensor | None:
        """True at condition positions that may be attended to, `[B, P]`: a text's padding may not."""
        return of_kind(cond, TextCondition).mask_BT

    def null_like(self, cond: Condition) -> Condition:
        """No text, for as many images."""
        return _no_text(cond, self.uncond_embedding)


def _no_text(cond: Condition, states: Tensor) -> Condition:
    """`states` in place of every text's, with the texts' own mask, as the reference has it."""
    text = of_kind(cond, TextCondition)
    return TextCondition(states.to(text.states_BTN.dtype).expand_as(text.states_BTN), text.mask_BT)


class LabelEmbedding(nn.Module):
    """Class label → start token, the one condition position; the last row is the null class."""

    def __init__(self, cfg: LlamaGenConfig) -> None:
        super().__init__()
        self.null_class = cfg.null_class
        self.embedding_table = nn.Embedding(cfg.num_classes + 1, cfg.dim)

    def forward(self, cond: Condition) -> Tensor:
        labels_B = of_kind(cond, ClassCondition).labels_B
        return self.embedding_table(labels_B)[:, None]  # type: ignore[no-any-return]

    def visible(self, cond: Condition) -> Tensor | None:  # noqa: ARG002 - as of a text
        """None: every position may be attended to."""
        return None

    def null_like(self, cond: Condition) -> Condition:
        """The null class, for as many images."""
        return of_kind(cond, ClassCondition).filled(self.null_class)


class CaptionVector(nn.Module):
    """States of a text encoder → one vector an image: fc2(gelu(fc1(mean of the text's own states))).

    VAR's class embedding where the condition is a text. `uncond_embedding` is the mean that stands for no
    text; no gradient reaches it, the layers learn what it means.
    """

    uncond_embedding: Tensor

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__()
        self.cap_proj = GeluFeedForward(cfg.text_dim, cfg.dim, cfg.dim)
        self.register_buffer("uncond_embedding", torch.randn(cfg.text_dim) / cfg.text_dim**0.5)

    def forward(self, cond: Condition) -> Tensor:
        """`[B, D]`."""
        text = of_kind(cond, TextCondition)
        own_BT1 = text.mask_BT[..., None]
        # An idle row has no state of its own.
        mean_BN = (text.states_BTN.float() * own_BT1).sum(1) / own_BT1.sum(1).clamp(min=1)
        return among_idle_rows(self.cap_proj, mean_BN.to(self.cap_proj.fc1.weight.dtype))

    def null_like(self, cond: Condition) -> Condition:
        """No text, for as many images."""
        return _no_text(cond, self.uncond_embedding)


class ClassVector(nn.Embedding):
    """Class label → VAR's class embedding `[B, D]`; the last row is the null class."""

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__(cfg.num_classes + 1, cfg.dim)
        self.null_class = cfg.null_class

    def forward(self, cond: Condition) -> Tensor:  # type: ignore[override]  # labels of their kind
        return super().forward(of_kind(cond, ClassCondition).labels_B)

    def null_like(self, cond: Condition) -> Condition:
        """The null class, for as many images."""
        return of_kind(cond, ClassCondition).filled(self.null_class)


class FinalLayer(nn.Module):
    """The embedding head: linear(LN(h)·(1 + scale) + shift), both shifted by the class embedding.

    Row 0 of the table is the shift, row 1 the scale; the raw class embedding is added to both.
    """

    def __init__(self, cfg: LlamaGenConfig | VARConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, cfg.dim) / cfg.dim**0.5)
        self.linear = nn.Linear(cfg.dim, cfg.code_dim)

    def forward(self, h_BSD: Tensor, cond_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + cond_BD[:, None]).chunk(2, dim=1)
        normal = F.layer_norm(h_BSD, h_BSD.shape[-1:], eps=1e-6)
        return self.linear(normal * (1 + scale) + shift)  # type: ignore[no-any-return]


def carry_over(source: nn.Module, target: nn.Module) -> int:
    """Copy the tensors that have the same name and shape in both modules; returns their number."""
    own = target.state_dict()
    fitting = {k: v for k, v in source.state_dict().items() if k in own and own[k].shape == v.shape}
    target.load_state_dict({**own, **fitting})
    return len(fitting)
