"""Named architectures as frozen dataclasses: what a checkpoint's tensors must look like.

A config is everything that a model's shapes depend on. It goes into a bundle's manifest as
plain JSON and comes back through the same dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass

from dd_core.layout import TokenLayout


@dataclass(frozen=True)
class VQConfig:
    """LlamaGen's VQ tokenizer: encoder, l2-normalised codebook, decoder.

    Down-sampling is `2 ** (len(channel_multipliers) - 1)`. VQ-16 is the default of the class;
    VQ-8 has one level less.
    """

    codebook_size: int = 16384
    code_dim: int = 8
    z_channels: int = 256
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2

    @property
    def downsampling(self) -> int:
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class GPTConfig:
    """LlamaGen's transformer, as a teacher and as a DD student.

    `grid` is the side of the square token grid (the layout is raster order over it),
    `num_classes` does not count the null class, which is the last row of the label table.
    """

    layers: int = 12
    heads: int = 12
    dim: int = 768
    codebook_size: int = 16384
    code_dim: int = 8
    grid: int = 16
    num_classes: int = 1000
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        """Feed-forward width: two thirds of 4·dim, rounded up to a multiple of 256."""
        return (int(8 * self.dim / 3) + 255) // 256 * 256

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.raster(self.grid * self.grid)

    @property
    def null_class(self) -> int:
        return self.num_classes
