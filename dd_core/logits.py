"""From logits to a token: guidance, temperature, top-k, top-p, multinomial.

Shapes: B batch, L tokens of a block, V codebook size. All functions are row-wise, without a
branch on data and without a host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dd_core.bounds import Step
from dd_core.errors import InvalidRequestError


@dataclass(frozen=True)
class LogitSettings:
    """Settings by which a teacher's logits become a distribution.

    Args:
        guidance: scale of classifier-free guidance, see `scale`.
        guidance_schedule: `constant`: u + s·(c − u) in every block, 1 = none (LlamaGen). `linear`: the
            scale grows from 1 in the first block to 1 + s in the last, 0 = none (VAR).
        guidance_until: last block that is guided; later ones use c alone. None = all are.
        temperature: divides the logits.
        top_k: keep the k largest (0 = all); ties with the k-th stay.
        top_p: keep the smallest set of largest probabilities that reaches p (1 = all); the
            token that crosses the threshold stays.

    Raises:
        InvalidRequestError: a value out of range.
    """

    guidance: Annotated[float, Field(le=1000, allow_inf_nan=False)] = 1.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    guidance_until: Step | None = None
    temperature: Annotated[float, Field(ge=1e-3, le=1000, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(le=2**20)] = 0
    top_p: Annotated[float, Field(allow_inf_nan=False)] = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("guidance", self.guidance < 0, "not be negative, got"),
            (
                "guidance_schedule",
                self.guidance_schedule not in ("constant", "linear"),
                "be constant or linear, not",
            ),
            ("temperature", self.temperature <= 0, "be positive, got"),
            ("top_k", self.top_k < 0, "be 0 (all) or more, got"),
            ("top_p", not 0 < self.top_p <= 1, "be in (0, 1], got"),
        )
        for name, broken, rule in rules:
            if broken:
                raise InvalidRequestError(f"{name} must {rule} {getattr(self, name)!r}", param=name)

    @property
    def guided(self) -> bool:
        """True if any block needs the unconditional half."""
        return self.guidance != (0.0 if self.guidance_schedule == "linear" else 1.0)

    def scale(self, step: int, num_blocks: int) -> float:
        """S of u + s·(c − u) in block `step` of `num_blocks`; 1 where it is not guided."""
        if self.guidance_until is not None and step > self.guidance_until:
            return 1.0
        if self.guidance_schedule == "constant":
            return self.guidance
        return 1.0 + self.guidance * step / max(1, num_blocks - 1)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: `[2B, …]`, conditional half first → `[B, …]`."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def log_probabilities(logits: Tensor, settings: LogitSettings) -> Tensor:
    """Log-probabilities after temperature, top-k and top-p; −∞ where a token is excluded.

    Args:
        logits: guided logits `[…, V]`.

    Returns:
        float32 `[…, V]`.
    """
    return keep_likely(logits, settings).log_softmax(-1)


def keep_likely(logits: Tensor, settings: LogitSettings) -> Tensor:
    """Logits / temperature, −∞ outside top-k and then top-p; float32 `[…, V]`."""
    logits = logits.float() / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        kth = logits.topk(settings.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        # The mass before a token decides, so the token that crosses the threshold stays.
        excluded = (p.cumsum(-1) - p) > settings.top_p
        excluded = torch.zeros_like(excluded).scatter(-1, order, excluded)
        logits = logits.masked_fill(excluded, float("-inf"))
    return logits


def multinomial(log_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws by inverting the distribution function: `[…, V]`, `[…]` in (0, 1) → `[…]` indices.

    The randomness is an argument, so that it can belong to an image and not to a batch. A token
    of probability zero is never drawn.
    """
    cumulative = log_p.exp().double().cumsum(-1)
    threshold = uniform.double()[..., None] * cumulative[..., -1:]
    # First index whose cumulative mass exceeds the threshold; excluded tokens add no mass.
    return (cumulative <= threshold).sum(-1)
