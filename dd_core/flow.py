"""Flow matching from noise to a token: Eq. 3 (velocity) and Eq. 4 (the map FM) of the paper.

One token's target is a mixture of point masses, Σ_j p_j δ(c_j), and its path is
x_t = (1 − t) ε + t c: t = 0 is noise, t = 1 the token. Then x_t | c_j ~ N(t c_j, (1 − t)² I), so
with the posterior w_j ∝ p_j exp(−‖x − t c_j‖² / (2 (1 − t)²)) and x̂ = Σ_j w_j c_j,

    V(x, t) = (x̂ − x) / (1 − t).

The paper's printed Eq. 3 lacks the factor −½ in the exponent; docs/06-trajectories.md derives it.

The solvers are in data prediction: between two times, with α = t, σ = 1 − t and
λ = log(α / σ), x(t′) = (σ′/σ) x − α′ (e^(−h) − 1) D with h = λ′ − λ and D an extrapolation of x̂.
The factor α′ (1 − e^(−h)) equals α′ − α σ′/σ, which is finite at both ends, where λ is not. A
multistep D needs finite λ, so the step from t = 0 and the one after it are of first order, and
the last step lands on x̂ itself.

Shapes: N tokens (any leading shape), V codebook size, C code dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from dd_core.errors import InvalidRequestError

SOLVERS = {"euler": 1, "dpmpp-2m": 2, "dpmpp-3m": 3}


@dataclass(frozen=True)
class FlowSettings:
    """The solver, and the number of evaluations of x̂ that it may spend.

    Args:
        solver: `euler` (= DPM-Solver++ order 1), `dpmpp-2m` or `dpmpp-3m` (the paper's).
        evaluations: number of evaluations, on times uniform in t; the paper uses 10.

    Raises:
        InvalidRequestError: an unknown solver or no evaluation.
    """

    solver: str = "dpmpp-3m"
    evaluations: Annotated[int, Field(le=1000)] = 10

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise InvalidRequestError(
                f"unknown solver {self.solver!r}; choose from {', '.join(SOLVERS)}", param="solver"
            )
        if self.evaluations < 1:
            raise InvalidRequestError(
                f"evaluations must be at least 1, got {self.evaluations}", param="evaluations"
            )


def posterior_mean(x_NC: Tensor, t: float, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """x̂ = E[c | x_t = x], `[N, C]`.

    The exponent −‖x − t c‖² / (2 (1 − t)²) is expanded so that only a matrix product with the
    codebook remains; terms that are the same for all codes cancel in the softmax. log p = −∞
    gives weight zero.
    """
    sigma2 = (1.0 - t) ** 2
    scores = (t / sigma2) * (x_NC @ codebook_VC.T) + log_p_NV
    scores = scores - (0.5 * t * t / sigma2) * codebook_VC.square().sum(-1)
    return scores.softmax(-1) @ codebook_VC


def velocity(x_NC: Tensor, t: float, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """V(x, t) of Eq. 3 (with the exponent as derived above), for 0 ≤ t < 1."""
    return (posterior_mean(x_NC, t, log_p_NV, codebook_VC) - x_NC) / (1.0 - t)


def flow_map(noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor, settings: FlowSettings) -> Tensor:
    """FM(ε, p) of Eq. 4: the index of the token that each noise is carried to, `[N]`.

    For ε ~ N(0, I), the result is distributed as p, up to the solver's error. The exact map does
    not depend on the scale of the codebook but a solver's error does, so the codes are brought
    to unit standard deviation here.

    Args:
        noise_NC: standard normal, float32.
        log_p_NV: log-probabilities, −∞ allowed.
    """
    with torch.autocast(noise_NC.device.type, enabled=False):  # scores grow as 1/(1 − t)²
        codes = codebook_VC / codebook_VC.std().clamp(min=1e-12)
        target = _solve(noise_NC.float(), log_p_NV, codes, settings)
        scores = target @ codes.T - 0.5 * codes.square().sum(-1)
        # Nearest code among those that can be drawn at all.
        return scores.masked_fill(log_p_NV == float("-inf"), float("-inf")).argmax(-1)


def _solve(x: Tensor, log_p: Tensor, codes: Tensor, settings: FlowSettings) -> Tensor:
    """Carries `x` from t = 0 to x̂ at the last grid time, `evaluations` look-ups of x̂ in all."""
    n, order = settings.evaluations, SOLVERS[settings.solver]
    history: list[tuple[float, Tensor]] = []  # (λ, x̂), newest first; only finite λ
    for i in range(n):
        t, after = i / n, (i + 1) / n
        mean = posterior_mean(x, t, log_p, codes)
        if i == n - 1:
            return mean
        if t > 0:
            history = [(math.log(t / (1 - t)), mean), *history][:order]
        decay = (1 - after) / (1 - t)
        guess = mean if t == 0 else _extrapolate(history, math.log(after / (1 - after)))
        x = decay * x + (after - t * decay) * guess
    return x


def _extrapolate(history: list[tuple[float, Tensor]], after: float) -> Tensor:
    """D: what the multistep formula of DPM-Solver++ puts in place of x̂ over [λ, λ′].

    With finite differences D1, D2 of x̂ in λ, order 2 adds ½h·D1 (in the form that keeps e^(−h)
    out of it) and order 3 the exact weights φ₂, φ₃ of the exponential integrator.
    """
    now, mean = history[0]
    h = after - now
    if len(history) == 1:
        return mean
    h1 = now - history[1][0]
    d1 = (mean - history[1][1]) / h1
    if len(history) == 2:
        return mean + (0.5 * h) * d1
    h2 = history[1][0] - history[2][0]
    d1_old = (history[1][1] - history[2][1]) / h2
    slope = d1 + (h1 / (h1 + h2)) * (d1 - d1_old)
    bend = 2.0 * (d1 - d1_old) / (h1 + h2)
    # ∫ e^(s) (s, s²/2) ds over the step, relative to ∫ e^(s) ds = 1 − e^(−h).
    whole = -math.expm1(-h)
    first = (h - whole) / whole
    second = (0.5 * h * h - (h - whole)) / whole
    return mean + first * slope + second * bend
