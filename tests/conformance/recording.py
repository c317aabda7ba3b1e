"""What the recorders of both families share: one fixture's tensors, and random weights that show errors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.naive import Margins

# A closest decision below these could fall the other way in float32: another seed is tried.
LEAST_CHOICE, LEAST_MASS = 1e-3, 1e-4

# As safetensors names them.
_TYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


@dataclass
class Recording:
    """One fixture: inputs (`in.`), outputs of the naive recomputation (`out.`), and its manifest entry."""

    name: str
    description: str
    config: dict[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    cases: dict[str, Any] = field(default_factory=dict)
    io: dict[str, Tensor] = field(default_factory=dict)
    margins: Margins = field(default_factory=Margins)

    def given(self, name: str, value: Tensor) -> None:
        self.io[f"in.{name}"] = _stored(value)

    def out(self, name: str, value: Tensor) -> None:
        self.io[f"out.{name}"] = _stored(value)

    @property
    def clear(self) -> bool:
        """No decision was close."""
        return self.margins.choice >= LEAST_CHOICE and self.margins.mass >= LEAST_MASS

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        closest = {"choice": self.margins.choice, "top_p_mass": self.margins.mass}
        return {
            "description": self.description,
            "io": f"{self.name}.io.safetensors",
            "weights": [f"{name}.weights.safetensors" for name in self.weights],
            "config": self.config,
            "cases": self.cases,
            "closest_decision": {k: v for k, v in closest.items() if math.isfinite(v)},
            "tensors": {k: [list(v.shape), _TYPES[v.dtype]] for k, v in self.io.items()},
        }


def _stored(value: Tensor) -> Tensor:
    value = value.float() if value.is_floating_point() else value
    return value.clone(memory_format=torch.contiguous_format)


# Pattern of a parameter's name → standard deviation. `None` = 1 / √(values that an output sums over).
# Streams are small, so that a wrong epsilon of a norm shows; what writes into one is weak, and what
# reads a small class embedding is strong.
_SPREAD: tuple[tuple[str, float | None, float], ...] = (
    (r".*(pos_start|pos_1LC|class_emb|lvl_embed|n_d_embed|embedding_table)(\.weight)?", 0.05, 1.0),
    (r"tok_embeddings\.(weight|bias)|word_embed\.(weight|bias)", 0.05, 1.0),
    (r"codebook_raw", 1.0, 1.0),
    (r".*ada_lin\.1\.weight|.*shared_ada_lin\.1\.weight", None, 16.0),
    (r".*ada_gss|.*ada_lin\.1\.bias|.*scale_shift_table", 0.5, 1.0),
    (r".*(attn\.proj|wo|w2|fc2|layerwise_n_d_embed\.\d+|conv2|proj_out)\.weight", None, 0.1),
    (r"head\.weight|output\.weight", None, 3.0),
    (r"(en|de)coder\.conv_in\.weight", None, 0.3),
    (r".*(attn\.proj|fc2|layerwise_n_d_embed\.\d+|conv2|proj_out)\.bias", 0.02, 1.0),
    (r".*bias", 0.1, 1.0),
    (r".*", None, 1.0),
)


def redraw(module: nn.Module, seed: int) -> None:
    """Every parameter anew from a seed, also those that start as zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(module.named_parameters())
    tensors |= {k: v for k, v in module.named_buffers() if k.endswith("uncond_embedding")}
    for name, value in tensors.items():
        fresh = torch.randn(value.shape, generator=generator)
        if re.search(r"(norm\w*)\.weight$", name):
            fresh = 1 + 0.2 * fresh
        elif name.endswith("scale_mul_1H11"):
            fresh = math.log(4) + 0.3 * fresh
            if name.startswith("blocks.0."):
                fresh[0, 0] = 5.2  # above ln 100: the clamp must show
        else:
            spread, gain = next((s, g) for p, s, g in _SPREAD if re.fullmatch(p, name))
            fresh *= gain * (spread if spread is not None else value[0].numel() ** -0.5)
        value.data.copy_(fresh)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
