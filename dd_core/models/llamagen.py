"""The LlamaGen family: a raster-order teacher and its one-pass student.

Both are `dd_core.models.protocols`; parameter names are those of the published checkpoints.

Shapes: B batch, L tokens, S = 1 + L positions (the start token first), C code dimension, V
codebook size, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dd_core.cache import KVCache
from dd_core.layout import TokenLayout, data_positions
from dd_core.models.config import GPTConfig
from dd_core.models.layers import Block, FinalLayer, LabelEmbedding, RMSNorm, rope_table


def _init(module: nn.Module) -> None:
    """Normal(0, 0.02) for matrices and embeddings, zero biases, as GPTs start."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class LlamaGenTeacher(nn.Module):
    """Next-token transformer: position i (the start token is 0) predicts token i."""

    rope: Tensor

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.cls_embedding = LabelEmbedding(cfg)
        self.tok_embeddings = nn.Embedding(cfg.codebook_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = nn.Linear(cfg.dim, cfg.codebook_size, bias=False)
        self.register_buffer("rope", rope_table(cfg), persistent=False)
        self.apply(_init)

    @property
    def layout(self) -> TokenLayout:
        return self.cfg.layout

    @property
    def null_class(self) -> int:
        return self.cfg.null_class

    def forward(self, tokens_BL: Tensor, cond_B: Tensor) -> Tensor:
        """Teacher forcing: logits of all tokens, `[B, L, V]`. The last token is never read."""
        h = torch.cat([self.cls_embedding(cond_B)[:, None], self.tok_embeddings(tokens_BL[:, :-1])], 1)
        rope = self.rope[: h.shape[1]]
        for i, block in enumerate(self.layers):
            h = block(h, rope, None, i)
        return self.output(self.norm(h))  # type: ignore[no-any-return]

    def new_cache(self, batch: int) -> KVCache:
        weight = self.output.weight
        cfg = self.cfg
        shape = (cfg.layers, batch, cfg.heads, self.layout.num_tokens, cfg.head_dim)
        return KVCache.allocate(*shape, device=weight.device, dtype=weight.dtype)

    def block_logits(self, tokens_BL: Tensor, cond_B: Tensor, step: int, cache: KVCache) -> Tensor:
        """Logits of token `step`, `[B, 1, V]`, reading positions `cache.length … step`.

        With an empty cache this is a causal prefill of the start token and `tokens[:, :step]`.
        """
        first, stop = cache.length, step + 1
        h = self.tok_embeddings(tokens_BL[:, max(0, first - 1) : step])
        if first == 0:
            h = torch.cat([self.cls_embedding(cond_B)[:, None], h], 1)
        rope = self.rope[first:stop]
        for i, block in enumerate(self.layers):
            h = block(h, rope, cache, i)
        cache.advance(stop - first)
        return self.output(self.norm(h[:, -1:]))  # type: ignore[no-any-return]


class LlamaGenStudent(nn.Module):
    """F_θ for raster order: 1 + L positions of codes or noise, position 1 + i predicts token i.

    A two-row table tells data (row 1) from noise (row 0) and is added once at the input; the
    start token counts as data.
    """

    rope: Tensor

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.cls_embedding = LabelEmbedding(cfg)
        self.tok_embeddings = nn.Linear(cfg.code_dim, cfg.dim)
        self.n_d_embed = nn.Embedding(2, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.output = nn.Linear(cfg.dim, cfg.codebook_size, bias=False)
        self.final_layer_conti = FinalLayer(cfg)
        self.register_buffer("rope", rope_table(cfg), persistent=False)
        self.apply(_init)

    @property
    def layout(self) -> TokenLayout:
        return self.cfg.layout

    def predict(self, x_BLC: Tensor, cond_B: Tensor, step_B: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: the embedding head's `[B, L, C]` and the logits head's `[B, L, V]`.

        `step_B` holds each sample's own step, so one batch can mix first and later jumps.
        """
        start = self.cls_embedding(cond_B)
        data = data_positions(self.layout, step_B).long()
        flag = torch.cat([torch.ones_like(data[:, :1]), data], 1)
        h = torch.cat([start[:, None], self.tok_embeddings(x_BLC)], 1) + self.n_d_embed(flag)
        for i, block in enumerate(self.layers):
            h = block(h, self.rope, None, i)
        logits = self.output(self.norm(h[:, 1:]))
        return self.final_layer_conti(h[:, 1:], start), logits

    def forward(self, x_BLC: Tensor, cond_B: Tensor, step_B: Tensor) -> tuple[Tensor, Tensor]:
        return self.predict(x_BLC, cond_B, step_B)
