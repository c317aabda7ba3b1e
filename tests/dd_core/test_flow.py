"""The flow map: its velocity in closed form, and the distribution of what it draws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2

from dd_core.errors import InvalidRequestError
from dd_core.flow import SOLVERS, FlowSettings, flow_map, posterior_mean, velocity

EXACT = FlowSettings("dpmpp-3m", 40)


def _chi_squared_p(counts: torch.Tensor, p: torch.Tensor) -> float:
    """p-value of Pearson's test, bins that expect fewer than 5 pooled."""
    expected = p.double() * counts.sum()
    small = expected < 5
    o = torch.cat([counts[~small].double(), counts[small].sum()[None].double()])
    e = torch.cat([expected[~small], expected[small].sum()[None]])
    o, e = o[e > 0], e[e > 0]
    return float(chi2.sf(float(((o - e) ** 2 / e).sum()), len(o) - 1))


def test_velocity_of_two_codes_on_a_line_in_closed_form() -> None:
    """Codes ±1 with p = ½: x̂ = tanh(t x / (1 − t)²). Fails if the exponent's −½ is lost."""
    x, t = torch.tensor([[-0.7], [0.1], [1.3]]), 0.4
    codes, log_p = torch.tensor([[-1.0], [1.0]]), torch.full((3, 2), math.log(0.5))
    mean = torch.tanh(t * x / (1 - t) ** 2)
    assert torch.allclose(posterior_mean(x, t, log_p, codes), mean, atol=1e-6)
    assert torch.allclose(velocity(x, t, log_p, codes), (mean - x) / (1 - t), atol=1e-6)


def test_map_of_two_codes_on_a_line_is_the_quantile() -> None:
    """In one dimension the flow keeps order: noise below the p-quantile goes to the lower code."""
    p = 0.3
    quantile = math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1)).item()
    noise = torch.linspace(-3, 3, 601)[:, None]
    log_p = torch.tensor([[math.log(p), math.log(1 - p)]]).expand(601, 2)
    drawn = flow_map(noise, log_p, torch.tensor([[-1.0], [1.0]]), FlowSettings("dpmpp-3m", 200))
    away = (noise[:, 0] - quantile).abs() > 0.02
    assert torch.equal(drawn[away], (noise[:, 0] > quantile).long()[away])


@pytest.mark.parametrize(("size", "dim"), [(2, 1), (3, 2), (8, 4), (64, 8), (1024, 8)])
def test_histogram_follows_the_probabilities(size: int, dim: int) -> None:
    """χ² of 20,000 mapped noises, at small codebooks too, where a solver's bias shows first.

    A correct map passes with probability 0.999 for a random seed; the seed is fixed.
    """
    generator = torch.Generator().manual_seed(size)
    codes = torch.nn.functional.normalize(torch.randn(size, dim, generator=generator), dim=-1)
    log_p = (1.5 * torch.randn(size, generator=generator)).log_softmax(-1)
    noise = torch.randn(20_000, dim, generator=generator)
    drawn = torch.cat([flow_map(n, log_p.expand(len(n), -1), codes, EXACT) for n in noise.split(5000)])
    assert _chi_squared_p(drawn.bincount(minlength=size), log_p.exp()) > 0.001


def test_histogram_test_has_power() -> None:
    """The same test refuses a distribution that is off by a few per cent."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.2])
    drawn = torch.multinomial(torch.tensor([0.53, 0.28, 0.19]), 20_000, True, generator=generator)
    assert _chi_squared_p(drawn.bincount(minlength=3), p) < 0.001


def test_excluded_tokens_are_never_drawn() -> None:
    codes = torch.nn.functional.normalize(torch.randn(16, 4), dim=-1)
    log_p = torch.randn(16)
    log_p[::2] = float("-inf")
    drawn = flow_map(torch.randn(2000, 4), log_p.log_softmax(-1).expand(2000, -1), codes, FlowSettings())
    assert (drawn % 2 == 1).all()


def test_one_certain_token_is_always_drawn() -> None:
    log_p = torch.full((100, 8), float("-inf"))
    log_p[:, 3] = 0.0
    codes = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    assert (flow_map(torch.randn(100, 4), log_p, codes, FlowSettings()) == 3).all()


def test_the_codebooks_scale_does_not_matter() -> None:
    codes = torch.nn.functional.normalize(torch.randn(32, 4), dim=-1)
    noise, log_p = torch.randn(500, 4), torch.randn(1, 32).log_softmax(-1).expand(500, -1)
    assert (
        flow_map(noise, log_p, codes, FlowSettings()) == flow_map(noise, log_p, 9 * codes, FlowSettings())
    ).all()


def test_higher_order_agrees_better_with_a_fine_solution() -> None:
    """At the paper's 10 evaluations order 3 beats order 2 beats Euler; 40 are nearly exact."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.nn.functional.normalize(torch.randn(128, 8, generator=generator), dim=-1)
    log_p = (1.5 * torch.randn(1, 128, generator=generator)).log_softmax(-1).expand(4000, -1)
    noise = torch.randn(4000, 8, generator=generator)
    fine = flow_map(noise, log_p, codes, FlowSettings("dpmpp-2m", 300))
    share = {
        s: (flow_map(noise, log_p, codes, FlowSettings(s, 10)) == fine).float().mean().item() for s in SOLVERS
    }
    assert 0.9 < share["euler"] < share["dpmpp-2m"] < share["dpmpp-3m"]
    assert (flow_map(noise, log_p, codes, EXACT) == fine).float().mean() > 0.998


def test_unknown_solver_names_the_choices() -> None:
    with pytest.raises(InvalidRequestError, match="euler, dpmpp-2m, dpmpp-3m"):
        FlowSettings("heun", 10)
    with pytest.raises(InvalidRequestError, match="evaluations"):
        FlowSettings("euler", 0)
