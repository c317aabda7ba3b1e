"""VAR's models prepared for inference: the same functions, with all that follows from the weights folded.

    class ─▶ table of the vectors that modulate the blocks        (was: a product a block, by image)
    noise │ data ─▶ table of two rows a block                     (was: a product a block, by token)
    q and v bias in one row, temperature as a number a head

The residual stream, norms, the input layer and both heads are float32.

Shapes: B batch, L tokens, S positions, C code dimension, V codebook size, D model width, H heads, E head
dimension, K classes and the null class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.cache import KVCache
from dd_core.condition import ClassCondition, Condition, of_kind
from dd_core.engine.arithmetic import Arithmetic
from dd_core.engine.attention import ScaleAttention
from dd_core.engine.layers import Product, free
from dd_core.exact import among_idle_rows
from dd_core.layout import TokenLayout, data_positions
from dd_core.models.layers import ClassVector, attend
from dd_core.models.protocols import ALL_TOKENS
from dd_core.models.var import AdaptiveBlock, Modulation, VARStudent, VARTeacher

_NORM_EPS = 1e-6
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
NextInputs = Callable[[Tensor, int, int], Tensor]


class FoldedBlock(nn.Module):
    """`AdaptiveBlock` for six given vectors, and attention over given positions."""

    heat_2H1: Tensor | None

    def __init__(self, block: AdaptiveBlock, arithmetic: Arithmetic) -> None:
        super().__init__()
        attn = block.attn
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        self.heads, self.scale = attn.heads, attn.scale
        self.qkv = Product(attn.mat_qkv.weight, bias, arithmetic.weights)
        self.proj = Product.of(attn.proj, arithmetic)
        self.fc1, self.fc2 = Product.of(block.ffn.fc1, arithmetic), Product.of(block.ffn.fc2, arithmetic)
        heat = None
        if attn.scale_mul_1H11 is not None:  # of queries; keys have unit length
            heat = attn.scale_mul_1H11.detach().clamp(max=math.log(100.0)).exp().view(1, -1, 1)
            heat = torch.cat([heat, torch.ones_like(heat)])
        self.register_buffer("heat_2H1", heat)

    def forward(
        self, x_BSD: Tensor, six: Tensor, attention: Attend, extra_BSD: Tensor | None = None
    ) -> Tensor:
        """`six` is `[B, 6, 1, D]`: γ₁, γ₂, s₁, s₂, b₁, b₂ of the equation of `AdaptiveBlock`."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(1)
        qkv = self.qkv(_modulated(x_BSD, scale1, shift1)).unflatten(-1, (3, self.heads, -1))
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if self.heat_2H1 is not None:
            size = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=self.heat_2H1.dtype)
            qk = (qk * (self.heat_2H1 / size.clamp_min(1e-12))).type_as(qkv)
        q, k, v = (t.transpose(1, 2) for t in (*qk.unbind(2), v))
        x_BSD = x_BSD + gamma1 * self.proj(attention(q, k, v, self.scale))
        if extra_BSD is not None:
            x_BSD = x_BSD + extra_BSD
        hidden = F.gelu(self.fc1(_modulated(x_BSD, scale2, shift2)), approximate="tanh")
        return x_BSD + gamma2 * self.fc2(hidden)  # type: ignore[no-any-return]


class _Vectors(nn.Module):
    """`Modulation`, computed in the arithmetic's type: class embeddings `[B, D]` → `[B, count, 1, D]`."""

    def __init__(self, layer: Modulation, arithmetic: Arithmetic) -> None:
        super().__init__()
        linear = layer[-1]
        assert isinstance(linear, nn.Linear)
        self.count, self.product = layer.count, Product.of(linear, arithmetic)

    def forward(self, class_BD: Tensor) -> Tensor:
        vectors = among_idle_rows(self.product, F.silu(class_BD))
        return vectors.reshape(len(class_BD), self.count, 1, -1).type_as(class_BD)


class _Table(nn.Module):
    """The same of every class at once, kept in the arithmetic's type: labels `[B]` → `[B, count, 1, D]`."""

    table_KN1D: Tensor

    @torch.no_grad()
    def __init__(self, layer: Modulation, class_KD: Tensor, arithmetic: Arithmetic, spent: bool) -> None:
        super().__init__()
        self.dtype = class_KD.dtype
        table = _Vectors(layer, arithmetic)(class_KD).to(arithmetic.weights)
        self.register_buffer("table_KN1D", table)
        if spent:
            free(layer)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.table_KN1D[labels_B].to(self.dtype)


class ConditionVectors(nn.Module):
    """The vectors that modulate the blocks and the logits head, by class or text.

    Those of classes are tables where these take at most half of the memory of float32 layers: with 1,000
    classes and a width of 1,024 in two bytes a number. Else a pass computes them.
    """

    def __init__(self, model: VARStudent | VARTeacher, arithmetic: Arithmetic, spent: bool) -> None:
        super().__init__()
        blocks = [block for block in model.blocks if isinstance(block, AdaptiveBlock)]
        layers = [block.ada_lin for block in blocks if block.ada_lin is not None]
        shared = model.shared_ada_lin
        layers += [model.head_nm.ada_lin] if shared is None else [shared, model.head_nm.ada_lin]
        class_KD = _worth_tables(model.class_emb, arithmetic)
        self.tables = class_KD is not None
        self.parts = nn.ModuleList(
            _Vectors(layer, arithmetic) if class_KD is None else _Table(layer, class_KD, arithmetic, spent)
            for layer in layers
        )
        gss = None if shared is None else torch.stack([b.ada_gss[0, 0].detach() for b in blocks])[:, :, None]
        self.register_buffer("offsets_N61D", gss)

    def forward(self, cond: Condition, class_BD: Tensor) -> tuple[list[Tensor], Tensor]:
        """Six vectors for each block, `[B, 6, 1, D]`, and two for the logits head, `[B, 2, 1, D]`."""
        index = of_kind(cond, ClassCondition).labels_B if self.tables else class_BD
        *six, two = (part(index) for part in self.parts)
        if isinstance(self.offsets_N61D, Tensor):
            [common] = six
            six = [common + offset for offset in self.offsets_N61D.unbind()]
        return six, two


class _Folded(nn.Module):
    """The parts that prepared student and teacher have in common."""

    def __init__(self, model: VARStudent | VARTeacher, arithmetic: Arithmetic, spent: bool) -> None:
        super().__init__()
        self.cfg = model.cfg
        self.class_emb, self.word_embed, self.head = model.class_emb, model.word_embed, model.head
        self.vectors = ConditionVectors(model, arithmetic, spent)
        self.blocks = nn.ModuleList(
            FoldedBlock(block, arithmetic) for block in model.blocks if isinstance(block, AdaptiveBlock)
        )

    @property
    def layout(self) -> TokenLayout:
        return self.cfg.layout

    def condition(self, cond: Condition) -> tuple[Tensor, list[Tensor], Tensor]:
        """The class embedding or the text's vector `[B, D]`, the vectors of each block and those of the
        logits head.

        Raises:
            InvalidRequestError: a class for a model that reads text, or the reverse.
        """
        class_BD = self.class_emb(cond)
        return class_BD, *self.vectors(cond, class_BD)

    def logits(self, h_BSD: Tensor, two: Tensor) -> Tensor:
        """The logits head."""
        return self.head(_modulated(h_BSD, *two.unbind(1)))  # type: ignore[no-any-return]


class FoldedStudent(_Folded):
    """`VARStudent` for inference (a `dd_core.models.protocols.Jump`)."""

    start_11D: Tensor
    place_LD: Tensor
    noise_or_data_2D: Tensor
    extra_N2D: Tensor
    block_L: Tensor

    @torch.no_grad()
    def __init__(self, model: VARStudent, arithmetic: Arithmetic, *, spent: bool = False) -> None:
        flags_2D, extra = model.n_d_embed.weight, []
        for layer in model.layerwise_n_d_embed:
            extra.append(layer(flags_2D))
            if spent:
                free(layer)
        super().__init__(model, arithmetic, spent)
        self.register_buffer("extra_N2D", torch.stack(extra))
        self.embedding_head = model.final_layer_conti
        self.attention = ScaleAttention(model.layout, model.cfg.student_mask, model.mask_SS)
        place_SD = model.lvl_embed(model.level_S) + model.pos_1LC[0]
        self.register_buffer("start_11D", model.pos_start + place_SD[0] + flags_2D[1])
        self.register_buffer("place_LD", place_SD[1:])
        self.register_buffer("noise_or_data_2D", flags_2D)
        self.register_buffer("block_L", model.block_L)

    def predict(
        self, x_BLC: Tensor, cond: Condition, step_B: Tensor, chosen: slice = ALL_TOKENS
    ) -> tuple[Tensor, Tensor]:
        """As `VARStudent.predict`."""
        class_BD, six, two = self.condition(cond)
        data_BL = data_positions(self.block_L, step_B).long()
        flag_BS = F.pad(data_BL, (1, 0), value=1)  # the start token counts as data
        tokens = self.word_embed(x_BLC) + self.place_LD + F.embedding(data_BL, self.noise_or_data_2D)
        h = torch.cat([class_BD[:, None] + self.start_11D, tokens], 1)
        for block, vectors, extra_2D in zip(self.blocks, six, self.extra_N2D[:-1], strict=True):
            h = block(h, vectors, self.attention, F.embedding(flag_BS, extra_2D))
        h = h[:, 1:] + F.embedding(data_BL, self.extra_N2D[-1])
        return self.embedding_head(h, class_BD), self.logits(h[:, chosen], two)


class FoldedTeacher(_Folded):
    """`VARTeacher` for inference (a `dd_core.models.protocols.BlockByBlock`).

    Args:
        next_inputs: of a tokenizer, which the model's own would otherwise keep whole.
    """

    place_LD: Tensor
    mask_SS: Tensor

    @torch.no_grad()
    def __init__(
        self, model: VARTeacher, next_inputs: NextInputs, arithmetic: Arithmetic, *, spent: bool = False
    ) -> None:
        super().__init__(model, arithmetic, spent)
        self.next_inputs = next_inputs
        self.pos_start = model.pos_start
        self.register_buffer("place_LD", model.lvl_embed(model.level_L) + model.pos_1LC[0])
        self.register_buffer("mask_SS", model.mask_SS)

    def null_like(self, cond: Condition) -> Condition:
        """The condition that stands for none, for as many images."""
        return self.class_emb.null_like(cond)

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache in the arithmetic's type."""
        cfg, block = self.cfg, self.blocks[0]
        assert isinstance(block, FoldedBlock)
        shape = (cfg.depth, batch, cfg.heads, self.layout.num_tokens, cfg.head_dim)
        return KVCache.allocate(shape, like=block.qkv.weight)

    def block_logits(self, tokens_BL: Tensor, cond: Condition, step: int, cache: KVCache) -> Tensor:
        """As `VARTeacher.block_logits`."""
        starts = self.layout.starts
        first, stop = starts.index(cache.length), step + 1
        place = slice(starts[first], starts[stop])
        class_BD, six, two = self.condition(cond)
        inputs = [(class_BD[:, None] + self.pos_start).expand(-1, starts[1], -1)] if first == 0 else []
        if stop > max(1, first):
            inputs.append(self.word_embed(self.next_inputs(tokens_BL, max(1, first), stop)))
        h = torch.cat(inputs, 1) + self.place_LD[place]
        masked = stop - first > 1 and self.cfg.prefix_mask
        mask = self.mask_SS[place, : place.stop] if masked else None
        for i, (block, vectors) in enumerate(zip(self.blocks, six, strict=True)):
            h = block(h, vectors, partial(_remembered, cache, i, mask))
        cache.advance(place.stop - place.start)
        return self.logits(h[:, -self.layout.block_sizes[step] :], two)


def _remembered(
    cache: KVCache, layer: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    return attend(q, k, v, cache, layer, mask=mask, scale=scale)


def _worth_tables(embedding: nn.Module, arithmetic: Arithmetic) -> Tensor | None:
    """The class embeddings `[K, D]`, where a table of their vectors takes at most half of a layer's memory;
    None where it takes more, or texts are the condition.
    """
    if not isinstance(embedding, ClassVector):
        return None
    classes, dim = embedding.weight.shape
    small = 2 * classes * arithmetic.weights.itemsize <= dim * embedding.weight.itemsize
    return embedding.weight.detach() if small else None


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x)·(1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=_NORM_EPS), 1 + scale)
