"""VAR's multi-scale VQVAE: image ↔ ten grids of codes that add up to one feature map.

    scale k: codes [B, p_k, p_k] ─▶ vectors ─▶ bicubic to p_last ─▶ φ_k ─▶ added to f̂

A token is a code of the residual that the coarser scales leave. Encoder and decoder are those of
`dd_core.models.vq`; the quantisers differ. VAR's next input (the teacher's) is f̂, averaged down to
the next scale's size.

Shapes: B batch, K scales, p side of a scale, L = Σ p² tokens (scale by scale, each in raster
order), C code dimension, V codebook size, M codes near a code, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.codebook import exchanged, lookup, nearest
from dd_core.models.config import MultiScaleConfig
from dd_core.models.protocols import Quantized
from dd_core.models.vq import Decoder, Encoder

_PUBLISHED_PHI = 4


def phi_index(scales: int, convolutions: int) -> tuple[int, ...]:
    """Indices of the shared φ convolutions that the scales use: the nearest tick to k / (K − 1).

    With K = 10 two scales lie exactly between two ticks, and the rounding of the ticks in float64
    decides; hence numpy's `linspace`, whose rounding the published weights were trained with. The
    reference spaces the ticks of four convolutions (all published models) unlike those of any other number.
    """
    margin = (1 / 3 if convolutions == _PUBLISHED_PHI else 1 / 2) / convolutions
    ticks = np.linspace(margin, 1 - margin, convolutions)
    return tuple(int(np.argmin(np.abs(ticks - k / max(1, scales - 1)))) for k in range(scales))


class ResidualScales(nn.Module):
    """f̂ from codes: what the quantiser, the decoder and VAR's teacher have in common."""

    cfg: MultiScaleConfig
    codebook_raw: nn.Parameter
    phi: nn.ModuleList
    phi_of: tuple[int, ...]

    @property
    def codebook_VC(self) -> Tensor:
        """The codes, as they are: not normalised."""
        return self.codebook_raw

    def add_scale(self, total_BCpp: Tensor, codes_BSC: Tensor, scale: int) -> Tensor:
        """f̂ + φ_k(upsample(codes)): the feature map with one scale more.

        Args:
            codes_BSC: the scale's vectors, S = p_k², in raster order.
        """
        side, last = self.cfg.sides[scale], self.cfg.sides[-1]
        h = codes_BSC.transpose(1, 2).reshape(len(codes_BSC), -1, side, side)
        if scale != len(self.cfg.sides) - 1:
            h = F.interpolate(h, size=(last, last), mode="bicubic")
        ratio = self.cfg.phi_ratio
        added: Tensor = h * (1 - ratio) + self.phi[self.phi_of[scale]](h) * ratio
        return total_BCpp + added

    def at_scale(self, map_BCpp: Tensor, scale: int) -> Tensor:
        """A feature map averaged down to a scale's size: its vectors `[B, p², C]`, in raster order."""
        side, last = self.cfg.sides[scale], self.cfg.sides[-1]
        small = map_BCpp if side == last else F.interpolate(map_BCpp, size=(side, side), mode="area")
        return small.flatten(2).transpose(1, 2)

    def accumulate(self, codes_BLC: Tensor, scales: int) -> list[Tensor]:
        """f̂ after each of the first `scales` scales, each `[B, C, p_last, p_last]`."""
        last = self.cfg.sides[-1]
        total = codes_BLC.new_zeros(len(codes_BLC), codes_BLC.shape[2], last, last)
        starts, maps = self.cfg.layout.starts, []
        for k in range(scales):
            total = self.add_scale(total, codes_BLC[:, starts[k] : starts[k + 1]], k)
            maps.append(total)
        return maps

    def next_inputs(self, tokens_BL: Tensor, first: int, stop: int) -> Tensor:
        """The input of VAR's teacher for the scales `first..stop-1` (`first` ≥ 1): `[B, Σ p², C]`.

        For scale k, f̂ of the scales before k averaged down to p_k. Tokens from scale `stop − 1` on
        are not looked at.
        """
        known = self.cfg.layout.starts[stop - 1]
        maps = self.accumulate(lookup(self.codebook_VC, tokens_BL[:, :known]), stop - 1)
        return torch.cat([self.at_scale(maps[k - 1], k) for k in range(first, stop)], 1)


class MultiScaleVQ(ResidualScales):
    """Encoder, residual quantiser over scales and decoder (a `dd_core.models.protocols.Tokenizer`)."""

    def __init__(self, cfg: MultiScaleConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 3, padding=1)
        self.codebook_raw = nn.Parameter(torch.randn(cfg.codebook_size, cfg.z_channels))
        self.phi = nn.ModuleList(
            nn.Conv2d(cfg.z_channels, cfg.z_channels, 3, padding=1) for _ in range(cfg.shared_phi)
        )
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 3, padding=1)
        self.decoder = Decoder(cfg)
        self.phi_of = phi_index(len(cfg.sides), cfg.shared_phi)

    def encode_continuous(self, image_B3HW: Tensor) -> Tensor:
        """Image → the feature map that the scales approximate, `[B, C, p_last, p_last]`."""
        return self.quant_conv(self.encoder(image_B3HW))  # type: ignore[no-any-return]

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Image in [−1, 1] → token indices `[B, L]`, greedily from the coarsest scale on."""
        return self.quantize(self.encode_continuous(image_B3HW)).tokens_BL

    def quantize(self, z_BCpp: Tensor) -> Quantized:
        """Feature map → codes, scale by scale, each of what the coarser ones leave.

        Commitment and fit are means over the scales of the squared distance of z and f̂ after the scale, with
        gradients for z and for φ. A later scale corrects an earlier one, which therefore need not foresee it:
        each f̂ reaches φ of its own scale and of those before.
        """
        tokens, vectors = [], []
        total = torch.zeros_like(z_BCpp)
        commitment = fit = z_BCpp.new_zeros(())
        for k in range(len(self.cfg.sides)):
            vectors.append(self.at_scale((z_BCpp - total).detach(), k))
            tokens.append(nearest(self.codebook_VC, vectors[-1]))
            total = self.add_scale(total, lookup(self.codebook_VC, tokens[-1]).detach(), k)
            commitment = commitment + F.mse_loss(z_BCpp, total.detach()) / len(self.cfg.sides)
            fit = fit + F.mse_loss(total, z_BCpp.detach()) / len(self.cfg.sides)
        return Quantized(torch.cat(tokens, 1), torch.cat(vectors, 1), total, commitment, fit)

    @torch.no_grad()
    def with_mistakes(self, tokens_BL: Tensor, near_VM: Tensor, choice_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens to read, some exchanged, and to predict; both `[B, L]`, of one image each.

        In an image's scales up to the first with an exchanged token its own are to be predicted. Those after
        it make up for it: they hold the codes nearest to what its own tokens add up to beyond the read ones.
        """
        codebook, starts, scales = self.codebook_VC, self.cfg.layout.starts, len(self.cfg.sides)
        whole = self.accumulate(lookup(codebook, tokens_BL), scales)[-1]
        total, read, target = torch.zeros_like(whole), [], []
        for k in range(scales):
            choice, own = (x[:, starts[k] : starts[k + 1]] for x in (choice_BL, tokens_BL))
            spoiled_B1 = (choice_BL[:, : starts[k]] >= 0).any(1, keepdim=True)
            target.append(torch.where(spoiled_B1, nearest(codebook, self.at_scale(whole - total, k)), own))
            read.append(exchanged(target[-1], near_VM, choice))
            total = self.add_scale(total, lookup(codebook, read[-1]), k)
        return torch.cat(read, 1), torch.cat(target, 1)

    def decode_continuous(self, z_BCpp: Tensor) -> Tensor:
        """Feature map → image `[B, 3, H, W]`, not clamped."""
        return self.decoder(self.post_quant_conv(z_BCpp))  # type: ignore[no-any-return]

    @torch.no_grad()
    def set_codes(self, codes_VC: Tensor) -> None:
        """Replace the codebook."""
        self.codebook_raw.copy_(codes_VC)

    def decode_tokens(self, tokens_BL: Tensor) -> Tensor:
        """Indices `[B, L]` → image `[B, 3, H, W]`, not clamped."""
        return self.to_image(lookup(self.codebook_VC, tokens_BL))

    def to_image(self, codes_BLC: Tensor) -> Tensor:
        """Codes or continuous embeddings `[B, L, C]` → image `[B, 3, H, W]`, not clamped."""
        return self.decode_continuous(self.accumulate(codes_BLC, len(self.cfg.sides))[-1])
