"""Muon: momentum, orthogonalised, for the matrices of a network (Jordan, 2024).

    M ← μM + (1 − μ)G;  O ≈ UVᵀ of (1 − μ)G + μM = USVᵀ;  W ← (1 − ηλ)W − η·0.2·√max(m, n)·O

The factor 0.2·√max(m, n) gives updates the size of AdamW's, so learning rates carry over (Liu et
al., 2025). PyTorch's own `Muon` orthogonalises in bfloat16 everywhere; here the arithmetic is
bfloat16 only where the device has it in hardware, since a CPU that emulates it spends several
seconds a step on it. Matrices of one shape are orthogonalised in one batched product.

Shapes: N matrices of one shape, m rows, n columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dd_core.models.build import AnyStudent, AnyTeacher
from dd_core.runtime import native_bfloat16
from training.optim.loop import update_at

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices_Nmn: Tensor, steps: int = 5) -> Tensor:
    """Newton–Schulz: the nearest (semi-)orthogonal matrices, singular values within about 0.7 to 1.2."""
    a, b, c = _COEFFICIENTS
    low = native_bfloat16(matrices_Nmn.device)
    x = matrices_Nmn.bfloat16() if low else matrices_Nmn.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result.to(matrices_Nmn.dtype)


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions only; `lr` as for AdamW."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            same: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same[p.shape].append(p)
            for shape, params in same.items():
                self._update(params, group, 0.2 * max(shape) ** 0.5)

    def _update(self, params: list[Tensor], group: dict[str, Any], factor: float) -> None:
        momentum, lr = group["momentum"], group["lr"]
        directions = []
        for p in params:
            assert p.grad is not None
            mean = self.state[p].setdefault("momentum", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - momentum)
            directions.append(p.grad.lerp(mean, momentum))
        updates = orthogonalised(torch.stack(directions))
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * factor)


class MatrixOptimizer:
    """Muon for the blocks' matrices and AdamW for everything else, as one optimizer.

    Muon orthogonalises the momentum of a matrix; on small transformers it reaches a loss in
    well under the steps that AdamW needs.
    """

    def __init__(
        self, model: AnyStudent | AnyTeacher, *, lr: float, matrix_lr: float, weight_decay: float
    ) -> None:
        inside = [p for p in model.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in inside}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.matrices = Muon([{"params": inside, "peak": matrix_lr}], matrix_lr, weight_decay=weight_decay)
        self.others = torch.optim.AdamW(
            [{"params": rest, "peak": lr}], lr=lr, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, factor: float) -> None:
        """One update at `factor` of the peak learning rates."""
        for optimizer in (self.matrices, self.others):
            update_at(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        return {"matrices": self.matrices.state_dict(), "others": self.others.state_dict()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.matrices.load_state_dict(state["matrices"])
        self.others.load_state_dict(state["others"])
