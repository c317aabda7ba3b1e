"""LlamaGen's VQ tokenizer: image ↔ grid of codes.

Shapes: B batch, H W pixels, h w code grid, L = h·w tokens in raster order, C code dimension,
V codebook size. Images are in [−1, 1]. Parameter names are those of the published
checkpoints (`vq_ds16_c2i.pt`), except that the codebook is `codebook_raw` here.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.codebook import exchanged, lookup, nearest
from dd_core.models.config import TokenizerConfig, VQConfig
from dd_core.models.protocols import Quantized


def _blocks(parts: nn.Module) -> list[nn.Module]:
    return [m for m in parts.modules() if isinstance(m, ResBlock | AttnBlock)]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _silu(x: Tensor) -> Tensor:
    """SiLU, in the place of what nobody else has."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """conv2(silu(GN(conv1(silu(GN(x)))))) + shortcut(x)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut: nn.Module = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_silu(self.norm1(x)))
        h = _silu(self.norm2(h))  # of the map itself nothing is kept: at the image's size each is large
        return self.conv2(h) + self.nin_shortcut(x)  # type: ignore[no-any-return]


class AttnBlock(nn.Module):
    """x + proj(single-head attention over all pixels of GN(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (f(n).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out[:, 0].transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def downsample(channels: int) -> nn.Module:
    """Stride-2 convolution; zero padding on the right and at the bottom only."""
    pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(channels: int) -> nn.Module:
    """Nearest neighbour ×2, then a convolution."""
    larger, conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(larger=larger, conv=conv))


class Level(nn.Module):
    """Residual blocks at one resolution, with attention at the lowest, and a change of scale."""

    downsample: nn.Module
    upsample: nn.Module

    def __init__(self, widths: list[int], attention: bool) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.res = nn.ModuleList(ResBlock(a, b) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) if attention else nn.Identity() for _, b in pairs)
        self.downsample, self.upsample = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return self.upsample(self.downsample(x))  # type: ignore[no-any-return]


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    """Image → `[B, z, h, w]`, one level a resolution, the lowest with attention."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        widths = [cfg.channels * m for m in cfg.channel_multipliers]
        self.conv_in = nn.Conv2d(3, cfg.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        last = len(widths) - 1
        for i, (before, width) in enumerate(itertools.pairwise([cfg.channels, *widths])):
            level = Level([before] + [width] * cfg.res_blocks, attention=i == last)
            if i != last:
                level.downsample = downsample(width)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], cfg.z_channels, 3, padding=1)

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual and attention blocks."""
        return _blocks(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(_silu(self.norm_out(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Levels in order of execution: level 0 is the lowest resolution and has the attention."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        widths = [cfg.channels * m for m in reversed(cfg.channel_multipliers)]
        self.conv_in = nn.Conv2d(cfg.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(itertools.pairwise([widths[0], *widths])):
            level = Level([before] + [width] * (cfg.res_blocks + 1), attention=i == 0)
            if i != len(widths) - 1:
                level.upsample = upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual and attention blocks."""
        return _blocks(self)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(_silu(self.norm_out(x)))  # type: ignore[no-any-return]


class VQTokenizer(nn.Module):
    """Encoder, l2-normalised codebook and decoder (a `dd_core.models.protocols.Tokenizer`)."""

    def __init__(self, cfg: VQConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.code_dim, 1)
        self.codebook_raw = nn.Parameter(F.normalize(torch.randn(cfg.codebook_size, cfg.code_dim), dim=-1))
        self.post_quant_conv = nn.Conv2d(cfg.code_dim, cfg.z_channels, 1)
        self.decoder = Decoder(cfg)

    @property
    def codebook_VC(self) -> Tensor:
        """The codes as look-ups return them: rows of unit length, `[V, C]`."""
        return F.normalize(self.codebook_raw, dim=-1, eps=1e-12)

    def encode_continuous(self, image_B3HW: Tensor) -> Tensor:
        """Image → unit-length code vectors before quantisation, `[B, h·w, C]`."""
        z = self.quant_conv(self.encoder(image_B3HW))
        return F.normalize(z.flatten(2).transpose(1, 2), dim=-1, eps=1e-12)

    def quantize(self, z_BLC: Tensor) -> Quantized:
        """Unit-length vectors → their nearest codes. Commitment: the mean of ‖z − sg(c)‖²."""
        tokens = nearest(self.codebook_VC, z_BLC.detach())
        codes = lookup(self.codebook_VC, tokens).detach()
        commitment = (z_BLC - codes).square().sum(-1).mean()
        return Quantized(tokens, z_BLC.detach(), codes, commitment, commitment.new_zeros(()))

    def decode_continuous(self, z_BLC: Tensor) -> Tensor:
        """Vectors in place of codes → image: `to_image`."""
        return self.to_image(z_BLC)

    @torch.no_grad()
    def set_codes(self, codes_VC: Tensor) -> None:
        """Replace the codebook; codes are of unit length."""
        self.codebook_raw.copy_(F.normalize(codes_VC, dim=-1))

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Image in [−1, 1] → indices of the nearest codes, `[B, h·w]` in raster order."""
        return nearest(self.codebook_VC, self.encode_continuous(image_B3HW))

    def with_mistakes(self, tokens_BL: Tensor, near_VM: Tensor, choice_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens to read, some exchanged, and to predict: the image's own, for which none stands in."""
        return exchanged(tokens_BL, near_VM, choice_BL), tokens_BL

    def decode_tokens(self, tokens_BL: Tensor) -> Tensor:
        """Indices `[B, L]` → image `[B, 3, H, W]`, roughly in [−1, 1], not clamped."""
        return self.to_image(lookup(self.codebook_VC, tokens_BL))

    def to_image(self, codes_BLC: Tensor) -> Tensor:
        """Codes or continuous embeddings `[B, L, C]` → image `[B, 3, H, W]`, not clamped."""
        side = int(codes_BLC.shape[1] ** 0.5)
        grid = codes_BLC.transpose(1, 2).reshape(len(codes_BLC), -1, side, side)
        return self.decoder(self.post_quant_conv(grid.contiguous()))  # type: ignore[no-any-return]
