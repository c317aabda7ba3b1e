"""A discriminator over the feature maps of LPIPS, for models that draw.

It is projected (Sauer et al., 2021): small trained heads on the frozen VGG16 maps that LPIPS
computes anyway. It costs next to nothing, and learns in far fewer images than one that starts
from pixels.

Shapes: B batch, F channels and h w places of a feature map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from dd_core.noise import stream_seed
from dd_core.runtime import mixed_precision
from training import parallel
from training.optim.loop import update_at

_CHANNELS = (64, 128, 256, 512, 512)  # of LPIPS's five VGG16 maps


class FeatureDiscriminator(nn.Module):
    """Real or drawn, for each place of each VGG16 map: five `[B, F, h, w]` → five logits `[B, 1, h, w]`.

    The maps come with unit-length vectors (as LPIPS has them) and are scaled to unit variance first.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(channels, width, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for channels in _CHANNELS
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [head(m * m.shape[1] ** 0.5) for head, m in zip(self.heads, maps, strict=True)]


def hinge(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """The discriminator's loss, a mean over maps: every scale has the same say."""
    terms = [
        F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def ramp(step: int, steps: float) -> float:
    """From 0 to 1 over the first `steps`: the judge needs some before its opinion is worth following."""
    return min(1.0, step / max(1.0, steps))


class Adversary:
    """A discriminator that learns beside the model that it judges, with an AdamW of its own.

    Spectral norms go on by one power iteration a step and not, as they would by themselves, one a forward
    pass: their number is that of the parts of a batch.
    """

    def __init__(self, lr: float, seed: int, device: torch.device) -> None:
        torch.manual_seed(stream_seed(seed, 0, "discriminator-init"))
        self.device = device
        self.judge = FeatureDiscriminator().to(device).eval()
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.judge.parameters()), "peak": lr}],
            lr=lr,
            betas=(0.5, 0.99),
            weight_decay=0.0,
        )

    def fooled(self, fake: list[Tensor]) -> Tensor:
        """The generator loss: how little the model's maps pass for real. No gradient for the judge."""
        self.judge.requires_grad_(False)
        try:
            with mixed_precision(self.device):
                return -torch.stack([f.float().mean() for f in self.judge(fake)]).mean()
        finally:
            self.judge.requires_grad_(True)

    def learn(self, real: list[Tensor], fake: list[Tensor], share: float) -> Tensor:
        """Add the gradients of one part of a batch; `share` of its loss, as of a mean over the batch."""
        with mixed_precision(self.device):
            opinion = share * hinge(self.judge(real), self.judge([m.detach() for m in fake]))
        opinion.backward()  # type: ignore[no-untyped-call]
        return opinion.detach()

    def opinions(self, real: list[Tensor], fake: list[Tensor], share: float) -> dict[str, Tensor]:
        """Both losses of one part of a batch, having learned from it: `fooled` is the model's to add."""
        return {"fooled": share * self.fooled(fake), "hinge": self.learn(real, fake, share)}

    def step(self, factor: float) -> None:
        """One update by the gradients of all parts and ranks, at `factor` of the learning rate."""
        parallel.sum_gradients(self.judge.parameters())
        update_at(self.optimizer, factor)
        self.judge.train()
        with torch.no_grad():
            for layer in self.judge.modules():
                if is_parametrized(layer, "weight"):
                    _ = layer.weight  # reading it does the iteration
        self.judge.eval()
