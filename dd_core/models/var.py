"""The VAR family: a next-scale teacher and its one-pass student.

Both are `dd_core.models.protocols`; parameter names are those of the published checkpoints.
A class embedding modulates every block (adaptive layer norm), and attention is over unit-length
queries and keys with a learned temperature a head. Where the condition is a text, one vector made of its
states stands wherever the class embedding stands.

Shapes: B batch, K scales, L tokens, S positions, C code dimension, V codebook size, D model width,
H heads, E head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.cache import KVCache
from dd_core.condition import Condition
from dd_core.exact import among_idle_rows
from dd_core.layout import TokenLayout, data_positions, paper_student_mask, student_mask, teacher_mask
from dd_core.models.config import VARConfig
from dd_core.models.layers import (
    CaptionVector,
    ClassVector,
    FinalLayer,
    GeluFeedForward,
    attend,
    carry_over,
)
from dd_core.models.protocols import ALL_TOKENS

_NORM_EPS = 1e-6
# Factors of first weights.
_INIT_HEAD, _INIT_ADALN, _INIT_GAMMA = 0.02, 0.5, 1e-5
# Standard deviation of what a student has and its teacher has not: little, so that it begins as the teacher.
_INIT_NEW = 0.02


class CosineAttention(nn.Module):
    """Multi-head attention with unit-length q and k; without `unit_length` scaled by 0.25 / √E."""

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.mat_qkv = nn.Linear(cfg.dim, 3 * cfg.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(cfg.dim))
        self.v_bias = nn.Parameter(torch.zeros(cfg.dim))
        self.proj = nn.Linear(cfg.dim, cfg.dim)
        self.scale = 1.0 if cfg.unit_length else 0.25 / math.sqrt(cfg.head_dim)
        self.scale_mul_1H11 = (
            nn.Parameter(torch.full((1, cfg.heads, 1, 1), math.log(4.0))) if cfg.unit_length else None
        )

    def forward(self, x_BSD: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BSD, self.mat_qkv.weight, bias)
        q, k, v = qkv.reshape(*x_BSD.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.scale_mul_1H11 is not None:
            heat = self.scale_mul_1H11.clamp(max=math.log(100.0)).exp()
            q, k = F.normalize(q, dim=-1, eps=1e-12) * heat, F.normalize(k, dim=-1, eps=1e-12)
        return self.proj(attend(q, k, v, cache, layer, mask=mask, scale=self.scale))  # type: ignore[no-any-return]


class Modulation(nn.Sequential):
    """linear(silu(class embedding)): `count` vectors an image, `[B, D]` → `[B, 1, count, D]`.

    This is a product with a row an image and not a row a token, so the rounding of an image would depend on
    its batch. The idle rows cost next to nothing.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, count * dim))
        self.count = count

    @property
    def weight(self) -> Tensor:
        """Of the linear map, `[count · D, D]`."""
        weight = self[-1].weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, cond_BD: Tensor) -> Tensor:
        vectors = among_idle_rows(super().forward, cond_BD)
        return vectors.reshape(len(cond_BD), 1, self.count, -1)


class AdaptiveBlock(nn.Module):
    """x += γ₁·attention(LN(x)·(1 + s₁) + b₁); [x += extra]; x += γ₂·feed_forward(LN(x)·(1 + s₂) + b₂).

    The six vectors come from the class embedding: by the block's own layer, or, `shared_adaln`,
    by one layer for all blocks plus the block's offsets.
    """

    ada_gss: nn.Parameter

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__()
        self.attn = CosineAttention(cfg)
        self.ffn = GeluFeedForward(cfg.dim, cfg.hidden, cfg.dim)
        self.ada_lin = None if cfg.shared_adaln else Modulation(cfg.dim, 6)
        if cfg.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, cfg.dim) / cfg.dim**0.5)

    def forward(
        self,
        x_BSD: Tensor,
        cond: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        layer: int,
        extra_BSD: Tensor | None = None,
    ) -> Tensor:
        """`cond` is the class embedding `[B, D]`, or the shared six vectors `[B, 1, 6, D]`."""
        six = self.ada_gss + cond if self.ada_lin is None else self.ada_lin(cond)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
        n = _norm(x_BSD) * (1 + scale1) + shift1
        x_BSD = x_BSD + gamma1 * self.attn(n, mask, cache, layer)
        if extra_BSD is not None:
            x_BSD = x_BSD + extra_BSD
        n = _norm(x_BSD) * (1 + scale2) + shift2
        return x_BSD + gamma2 * self.ffn(n)  # type: ignore[no-any-return]


class AdaptiveNorm(nn.Module):
    """LN(x)·(1 + scale) + shift before the logits, both from the class embedding."""

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__()
        self.ada_lin = Modulation(cfg.dim, 2)

    def forward(self, x_BSD: Tensor, cond_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_BD).unbind(2)
        return _norm(x_BSD) * (1 + scale) + shift  # type: ignore[no-any-return]


class _Trunk(nn.Module):
    """The parameters that teacher and student have in common, in the checkpoint's names.

    Args:
        levels: number of scales, and one more where the start token has a level of its own.
        positions: length of the sequence that the model reads.
    """

    def __init__(self, cfg: VARConfig, levels: int, positions: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.word_embed = nn.Linear(cfg.code_dim, cfg.dim)
        self.class_emb = CaptionVector(cfg) if cfg.text_dim else ClassVector(cfg)
        self.pos_start = nn.Parameter(torch.randn(1, 1, cfg.dim) * 0.02)
        self.pos_1LC = nn.Parameter(torch.randn(1, positions, cfg.dim) * 0.02)
        self.lvl_embed = nn.Embedding(levels, cfg.dim)
        self.blocks = nn.ModuleList(AdaptiveBlock(cfg) for _ in range(cfg.depth))
        self.shared_ada_lin = Modulation(cfg.dim, 6) if cfg.shared_adaln else None
        self.head_nm = AdaptiveNorm(cfg)
        self.head = nn.Linear(cfg.dim, cfg.codebook_size)
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        """Begin as VAR does: all linear maps and embeddings at √(1 / 3D), the maps that end a block at that
        over √(2·depth), logits near zero, and blocks that add next to nothing (γ).
        """
        cfg, std = self.cfg, math.sqrt(1 / self.cfg.dim / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(table, std=std)
        self.head.weight.mul_(_INIT_HEAD)
        self.head_nm.ada_lin.weight.mul_(_INIT_ADALN)
        for block in self.blocks:
            assert isinstance(block, AdaptiveBlock)
            for last in (block.attn.proj, block.ffn.fc2):
                last.weight.div_(math.sqrt(2 * cfg.depth))
            if block.ada_lin is None:
                block.ada_gss[:, :, :2].mul_(_INIT_GAMMA)
                block.ada_gss[:, :, 2:].mul_(_INIT_ADALN)
            else:
                block.ada_lin.weight[: 2 * cfg.dim].mul_(_INIT_GAMMA)
                block.ada_lin.weight[2 * cfg.dim :].mul_(_INIT_ADALN)

    @property
    def layout(self) -> TokenLayout:
        return self.cfg.layout

    def label(self, cond: Condition) -> Tensor:
        """The class embedding, or the text's vector, `[B, D]`.

        Raises:
            InvalidRequestError: a class for a model that reads text, or the reverse.
        """
        return self.class_emb(cond)  # type: ignore[no-any-return]

    def modulation(self, cond_BD: Tensor) -> Tensor:
        """The input of each block: the class embedding, or the vectors that all blocks share."""
        return cond_BD if self.shared_ada_lin is None else self.shared_ada_lin(cond_BD)


class VARTeacher(_Trunk):
    """Next-scale transformer: the positions of scale k predict the tokens of scale k.

    Position 0 holds the class embedding and predicts scale 0; those of scale k ≥ 1 read the image
    so far, f̂ averaged down to p_k. That is the tokenizer's to compute: `next_inputs` is
    `MultiScaleVQ.next_inputs` of the tokenizer that the tokens are of.
    """

    level_L: Tensor
    mask_SS: Tensor

    def __init__(self, cfg: VARConfig, next_inputs: Callable[[Tensor, int, int], Tensor]) -> None:
        super().__init__(cfg, len(cfg.sides), cfg.layout.num_tokens)
        self.next_inputs = next_inputs
        self.derive()

    def derive(self) -> None:
        """Buffers that follow from the config."""
        self.register_buffer("level_L", torch.tensor(self.layout.block_of), persistent=False)
        # Without the start token's own row and column: the first scale is the start token.
        self.register_buffer("mask_SS", teacher_mask(self.layout)[1:, 1:], persistent=False)

    def null_like(self, cond: Condition) -> Condition:
        """The condition that stands for none, for as many images."""
        return self.class_emb.null_like(cond)

    def forward(self, tokens_BL: Tensor, cond: Condition) -> Tensor:
        """Teacher forcing: logits of all tokens, `[B, L, V]`. The last scale is never read."""
        return self._run(tokens_BL, cond, 0, len(self.cfg.sides), None)

    def new_cache(self, batch: int) -> KVCache:
        cfg = self.cfg
        shape = (cfg.depth, batch, cfg.heads, self.layout.num_tokens, cfg.head_dim)
        return KVCache.allocate(shape, like=self.head.weight)

    def block_logits(self, tokens_BL: Tensor, cond: Condition, step: int, cache: KVCache) -> Tensor:
        """Logits of the tokens of scale `step`, `[B, p², V]`.

        Scales that the cache lacks are read in the same pass. With `cfg.prefix_mask` off that pass
        has no mask, as the released hybrid has it: earlier scales then see later ones, which is not
        the teacher's own conditional.
        """
        first = self.layout.starts.index(cache.length)
        logits = self._run(tokens_BL, cond, first, step + 1, cache)
        cache.advance(self.layout.starts[step + 1] - cache.length)
        return logits[:, -self.layout.block_sizes[step] :]

    def _run(
        self, tokens_BL: Tensor, label: Condition, first: int, stop: int, cache: KVCache | None
    ) -> Tensor:
        cond = self.label(label)
        parts = [(cond[:, None] + self.pos_start).expand(-1, self.layout.starts[1], -1)] if first == 0 else []
        if stop > max(1, first):
            inputs = self.next_inputs(tokens_BL, max(1, first), stop)
            parts.append(self.word_embed(inputs.to(self.word_embed.weight.dtype)))
        place = slice(self.layout.starts[first], self.layout.starts[stop])
        h = torch.cat(parts, 1) + self.lvl_embed(self.level_L[place]) + self.pos_1LC[:, place]
        masked = stop - first > 1 and (cache is None or self.cfg.prefix_mask)
        mask = self.mask_SS[place, : place.stop] if masked else None
        six = self.modulation(cond)
        for i, block in enumerate(self.blocks):
            h = block(h, six, mask, cache, i)
        return self.head(self.head_nm(h, cond))  # type: ignore[no-any-return]


class VARStudent(_Trunk):
    """F_θ for next-scale order: 1 + L positions of codes or noise, position 1 + i predicts token i.

    The start token is a level of its own. A two-row table tells data (row 1) from noise (row 0);
    it enters at the input, and through a layer of its own in every block and before both heads.
    """

    GROWS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "blocks": ("attn.proj.weight", "attn.proj.bias", "ffn.fc2.weight", "ffn.fc2.bias"),
        "layerwise_n_d_embed": ("weight", "bias"),
    }
    CONDITION: ClassVar[tuple[str, ...]] = ("class_emb.",)

    level_S: Tensor
    mask_SS: Tensor
    block_L: Tensor

    def __init__(self, cfg: VARConfig) -> None:
        super().__init__(cfg, len(cfg.sides) + 1, cfg.layout.num_tokens + 1)
        self.n_d_embed = nn.Embedding(2, cfg.dim)
        self.layerwise_n_d_embed = nn.ModuleList(nn.Linear(cfg.dim, cfg.dim) for _ in range(cfg.depth + 1))
        self.final_layer_conti = FinalLayer(cfg)
        for part in (self.n_d_embed, *self.layerwise_n_d_embed, self.final_layer_conti.linear):
            assert isinstance(part, nn.Linear | nn.Embedding)
            nn.init.normal_(part.weight, std=_INIT_NEW)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
        self.derive()
        if cfg.student_mask == "checkpoint":
            self.register_buffer("mask_SS", student_mask(cfg.layout))

    def derive(self) -> None:
        """Buffers that follow from the config; a checkpoint's own mask is none of them."""
        layout = self.layout
        level = torch.tensor([0] + [k + 1 for k in layout.block_of])
        self.register_buffer("level_S", level, persistent=False)
        self.register_buffer("block_L", layout.block_index(), persistent=False)
        if self.cfg.student_mask != "checkpoint":
            paper = self.cfg.student_mask == "paper"
            mask = paper_student_mask(layout) if paper else student_mask(layout)
            self.register_buffer("mask_SS", mask, persistent=False)

    @torch.no_grad()
    def from_teacher(self, teacher: nn.Module, codebook_VC: Tensor) -> Self:  # noqa: ARG002
        """This student with the teacher's weights (line 1 of Algorithm 2).

        The start token, which predicted the first scale itself, keeps its level and position. Those of the
        first scale's token are new (App. B), as are the noise/data table, its layers and the embedding head.
        """
        assert isinstance(teacher, VARTeacher), "both are of one config"
        carry_over(teacher, self)
        tables = (self.lvl_embed.weight, teacher.lvl_embed.weight), (self.pos_1LC[0], teacher.pos_1LC[0])
        for own, old in tables:
            own[0] = old[0]
            own[2:] = old[1:]
        return self

    def predict(
        self, x_BLC: Tensor, cond: Condition, step_B: Tensor, chosen: slice = ALL_TOKENS
    ) -> tuple[Tensor, Tensor]:
        """One pass: the embedding head's `[B, L, C]` and the logits head's of `chosen`, `[B, chosen, V]`."""
        class_BD = self.label(cond)
        data = data_positions(self.block_L, step_B).long()
        extra = self.n_d_embed(torch.cat([torch.ones_like(data[:, :1]), data], 1))
        start = (class_BD[:, None] + self.pos_start).expand(len(x_BLC), 1, -1)
        h = torch.cat([start, self.word_embed(x_BLC)], 1)
        h = h + self.lvl_embed(self.level_S) + self.pos_1LC + extra
        six = self.modulation(class_BD)
        for i, block in enumerate(self.blocks):
            h = block(h, six, self.mask_SS, None, i, self.layerwise_n_d_embed[i](extra))
        h = (h + self.layerwise_n_d_embed[-1](extra))[:, 1:]
        return self.final_layer_conti(h, class_BD), self.head(self.head_nm(h[:, chosen], class_BD))

    forward = predict


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_NORM_EPS)
