"""The LlamaGen family: a raster-order teacher and its one-pass student.

Both are `dd_core.models.protocols`; parameter names are those of the published checkpoints. The
condition is P positions in front of the tokens: one for a class, 120 for a text.

Shapes: B batch, L tokens, P condition positions, S = P + L positions, C code dimension, V codebook
size, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from dd_core.cache import KVCache
from dd_core.condition import Condition
from dd_core.layout import TokenLayout, data_positions
from dd_core.models.config import LlamaGenConfig
from dd_core.models.layers import (
    Block,
    CaptionEmbedding,
    FinalLayer,
    LabelEmbedding,
    RMSNorm,
    carry_over,
    rope_table,
)
from dd_core.models.protocols import ALL_TOKENS


def _init(module: nn.Module) -> None:
    """Normal(0, 0.02) for matrices and embeddings, zero biases, as GPTs start."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class _Trunk(nn.Module):
    """The parts that teacher and student have in common: the condition's embedding, blocks and logits."""

    rope: Tensor
    block_L: Tensor

    def __init__(self, cfg: LlamaGenConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.cls_embedding = CaptionEmbedding(cfg) if cfg.text_dim else LabelEmbedding(cfg)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = nn.Linear(cfg.dim, cfg.codebook_size, bias=False)
        self.derive()

    def derive(self) -> None:
        """Buffers that follow from the config."""
        self.register_buffer("rope", rope_table(self.cfg), persistent=False)
        self.register_buffer("block_L", self.layout.block_index(), persistent=False)

    @property
    def layout(self) -> TokenLayout:
        return self.cfg.layout

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks."""
        return self.layers

    def condition(self, cond: Condition) -> Tensor:
        """The P condition positions, `[B, P, D]`.

        Raises:
            InvalidRequestError: a class for a model that reads text, or the reverse.
        """
        return self.cls_embedding(cond)  # type: ignore[no-any-return]

    def mask(self, cond: Condition, first: int, stop: int) -> Tensor | None:
        """True where positions `first..stop-1` may attend, `[B, 1, new, stop]`; None = to all earlier ones.

        A text's padding is seen by nobody, and by itself: attention over nothing is not a number.
        """
        visible_BP = self.cls_embedding.visible(cond)
        if visible_BP is None:
            return None
        position = torch.arange(stop, device=visible_BP.device)
        query = position[first:, None]
        tokens = visible_BP.new_ones(len(cond), max(0, stop - self.cfg.prefix))
        visible = torch.cat([visible_BP, tokens], 1)[:, None, None, :stop]
        return (visible & (position <= query)) | (position == query)


class LlamaGenTeacher(_Trunk):
    """Next-token transformer: position P − 1 + i predicts token i."""

    def __init__(self, cfg: LlamaGenConfig) -> None:
        super().__init__(cfg)
        self.tok_embeddings = nn.Embedding(cfg.codebook_size, cfg.dim)
        self.apply(_init)

    def null_like(self, cond: Condition) -> Condition:
        """The condition that stands for none, for as many images."""
        return self.cls_embedding.null_like(cond)

    def forward(self, tokens_BL: Tensor, cond: Condition) -> Tensor:
        """Teacher forcing: logits of all tokens, `[B, L, V]`. The last token is never read."""
        h = torch.cat([self.condition(cond), self.tok_embeddings(tokens_BL[:, :-1])], 1)
        stop = h.shape[1]
        mask = self.mask(cond, 0, stop)
        for i, block in enumerate(self.layers):
            h = block(h, self.rope[:stop], None, i, mask)
        return self.output(self.norm(h[:, self.cfg.prefix - 1 :]))  # type: ignore[no-any-return]

    def new_cache(self, batch: int) -> KVCache:
        cfg = self.cfg
        shape = (cfg.layers, batch, cfg.heads, cfg.prefix - 1 + self.layout.num_tokens, cfg.head_dim)
        return KVCache.allocate(shape, like=next(self.layers.parameters()))

    def block_logits(self, tokens_BL: Tensor, cond: Condition, step: int, cache: KVCache) -> Tensor:
        """Logits of token `step`, `[B, 1, V]`, reading what the cache does not hold yet.

        With an empty cache this is a causal prefill of the condition and `tokens[:, :step]`.
        """
        prefix, first = self.cfg.prefix, cache.length
        stop = prefix + step
        h = self.tok_embeddings(tokens_BL[:, max(0, first - prefix) : step])
        if first == 0:
            h = torch.cat([self.condition(cond), h], 1)
        rope, mask = self.rope[first:stop], self.mask(cond, first, stop)
        for i, block in enumerate(self.layers):
            h = block(h, rope, cache, i, mask)
        cache.advance(stop - first)
        return self.output(self.norm(h[:, -1:]))  # type: ignore[no-any-return]


class LlamaGenStudent(_Trunk):
    """F_θ for raster order: P + L positions of codes or noise, position P + i predicts token i.

    A two-row table tells data (row 1) from noise (row 0) and is added once at the input; the
    condition counts as data. The embedding head is modulated by the condition's last position:
    the class, or the last word (no text-conditional student was ever released).
    """

    GROWS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layers": ("attention.wo.weight", "feed_forward.w2.weight")
    }
    CONDITION: ClassVar[tuple[str, ...]] = ("cls_embedding.",)

    def __init__(self, cfg: LlamaGenConfig) -> None:
        super().__init__(cfg)
        self.tok_embeddings = nn.Linear(cfg.code_dim, cfg.dim)
        self.n_d_embed = nn.Embedding(2, cfg.dim)
        self.final_layer_conti = FinalLayer(cfg)
        self.apply(_init)

    @torch.no_grad()
    def from_teacher(self, teacher: nn.Module, codebook_VC: Tensor) -> Self:
        """This student with the teacher's weights (line 1 of Algorithm 2).

        The input layer, an embedding in the teacher and a linear map of the code vector here, is the
        least-squares fit: W c_j + b ≈ the teacher's embedding of token j. Only the noise/data table and the
        embedding head are new.
        """
        assert isinstance(teacher, LlamaGenTeacher), "both are of one config"
        carry_over(teacher, self)
        table = teacher.tok_embeddings.weight.float()
        inputs = torch.cat([codebook_VC, torch.ones_like(codebook_VC[:, :1])], 1)
        # In float64, so that what LAPACK leaves to chance in the last bits is gone after rounding.
        fit = torch.linalg.lstsq(inputs.double().cpu(), table.double().cpu()).solution.to(table)
        self.tok_embeddings.weight.copy_(fit[:-1].T)
        self.tok_embeddings.bias.copy_(fit[-1])
        return self

    def predict(
        self, x_BLC: Tensor, cond: Condition, step_B: Tensor, chosen: slice = ALL_TOKENS
    ) -> tuple[Tensor, Tensor]:
        """One pass: the embedding head's `[B, L, C]` and the logits head's of `chosen`, `[B, chosen, V]`.

        `step_B` holds each sample's own step, so one batch can mix first and later jumps.
        """
        start, prefix = self.condition(cond), self.cfg.prefix
        data = data_positions(self.block_L, step_B).long()
        flag = torch.cat([data.new_ones(len(data), prefix), data], 1)
        h = torch.cat([start, self.tok_embeddings(x_BLC)], 1) + self.n_d_embed(flag)
        mask = self.mask(cond, 0, h.shape[1])
        for i, block in enumerate(self.layers):
            h = block(h, self.rope, None, i, mask)
        h = h[:, prefix:]
        return self.final_layer_conti(h, start[:, -1]), self.output(self.norm(h[:, chosen]))

    forward = predict
