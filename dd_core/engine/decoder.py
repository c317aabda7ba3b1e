"""Tokenizers prepared for inference: no encoder, and a decoder whose convolutions are laid out and folded.

    nearest ×2, then 3×3 convolution ─▶ one transposed 4×4 convolution of stride 2: 4/9 of the products

    out[2i + a] of the pair reads three pixels of the doubled map, which are two of the map itself; the
    taps that fall on the same pixel are added up. Zero padding is the same in both.

Shapes: B batch, C code dimension, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dd_core.engine.arithmetic import Arithmetic
from dd_core.engine.layers import constant, shallow
from dd_core.models.build import AnyTokenizer
from dd_core.models.multiscale_vq import MultiScaleVQ, ResidualScales
from dd_core.models.vq import VQTokenizer

# Decoders with fewer channels at the image's size gain nothing from either fold in float32.
WIDE = 64
# Row p: which of a 3-tap kernel's taps fall on tap p of the 4-tap transposed one.
_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def doubled(conv: nn.Module) -> nn.ConvTranspose2d:
    """The transposed convolution that equals nearest ×2 followed by `conv` (3×3, padding 1)."""
    assert isinstance(conv, nn.Conv2d)
    taps = torch.tensor(_TAPS, dtype=conv.weight.dtype, device=conv.weight.device)
    made = nn.ConvTranspose2d(1, 1, 4, stride=2, padding=1)
    made.in_channels, made.out_channels = conv.in_channels, conv.out_channels
    made.weight = constant(torch.einsum("pa,oiab,qb->iopq", taps, conv.weight.detach(), taps))
    made.bias = conv.bias
    return made


def laid_out(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with weights of `dtype`, channels last, and every `upsample` as one convolution."""
    copy = shallow(module)
    for name, tensor in module._parameters.items():
        layout = torch.channels_last if tensor is not None and tensor.dim() == 4 else torch.preserve_format
        copy._parameters[name] = None if tensor is None else constant(tensor.to(dtype, memory_format=layout))
    for name, part in module.named_children():
        pair = name == "upsample" and isinstance(part, nn.Sequential)
        copy._modules[name] = laid_out(doubled(part.get_submodule("conv")) if pair else part, dtype)
    return copy


class _Decoder(nn.Module):
    """Feature map → image, through `post_quant_conv` and the decoder."""

    def __init__(self, tokenizer: AnyTokenizer, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.folded = arithmetic.folds_narrow or tokenizer.cfg.channels >= WIDE
        both = nn.Sequential(tokenizer.post_quant_conv, tokenizer.decoder)
        self.both = laid_out(both, arithmetic.decoder) if self.folded else both
        self.dtype = arithmetic.decoder

    def forward(self, z_BChw: Tensor) -> Tensor:
        if not self.folded:
            return self.both(z_BChw)  # type: ignore[no-any-return]
        image: Tensor = self.both(z_BChw.to(self.dtype, memory_format=torch.channels_last))
        return image.to(z_BChw.dtype, memory_format=torch.contiguous_format)


class PreparedVQ(nn.Module):
    """`VQTokenizer` for inference (a `dd_core.models.protocols.Pictures`)."""

    def __init__(self, tokenizer: VQTokenizer, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.codes = constant(tokenizer.codebook_VC)
        self.decoder = _Decoder(tokenizer, arithmetic)

    @property
    def codebook_VC(self) -> Tensor:
        """The codes, of unit length."""
        return self.codes

    def to_image(self, codes_BLC: Tensor) -> Tensor:
        """As `VQTokenizer.to_image`."""
        side = int(codes_BLC.shape[1] ** 0.5)
        grid = codes_BLC.transpose(1, 2).reshape(len(codes_BLC), -1, side, side)
        return self.decoder(grid.contiguous())  # type: ignore[no-any-return]


class PreparedScales(ResidualScales):
    """`MultiScaleVQ` for inference (a `dd_core.models.protocols.Pictures`); f̂ is added up in float32."""

    def __init__(self, tokenizer: MultiScaleVQ, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.cfg, self.phi_of = tokenizer.cfg, tokenizer.phi_of
        self.codebook_raw, self.phi = tokenizer.codebook_raw, tokenizer.phi
        self.decoder = _Decoder(tokenizer, arithmetic)

    def to_image(self, codes_BLC: Tensor) -> Tensor:
        """As `MultiScaleVQ.to_image`."""
        return self.decoder(self.accumulate(codes_BLC, len(self.cfg.sides))[-1])  # type: ignore[no-any-return]
