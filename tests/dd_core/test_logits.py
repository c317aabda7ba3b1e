"""Guidance, filters and multinomial draws."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from dd_core.errors import InvalidRequestError
from dd_core.logits import LogitSettings, guide, log_probabilities, multinomial

INF = float("inf")


def _kept(logits: list[float], **settings: float) -> list[int]:
    log_p = log_probabilities(torch.tensor(logits), LogitSettings(**settings))  # type: ignore[arg-type]
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    return (log_p > -INF).nonzero().flatten().tolist()


def test_guidance_is_an_extrapolation_from_the_unconditional() -> None:
    logits = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert torch.equal(guide(logits, 1.0), logits[:1])
    assert torch.equal(guide(logits, 0.0), logits[1:])
    assert guide(logits, 2.0).tolist() == [[2.0, 0.0]]


def test_constant_guidance_is_the_same_in_every_block() -> None:
    draw = LogitSettings(2.0)
    assert [draw.scale(k, 4) for k in range(4)] == [2.0] * 4
    assert draw.guided and not LogitSettings().guided and not LogitSettings(1.0).guided


def test_linear_guidance_grows_from_none_to_one_plus_its_scale() -> None:
    """VAR: (1 + t)·c − t·u with t = cfg·k / (K − 1), so the first block is never guided."""
    draw = LogitSettings(1.5, "linear")
    assert [draw.scale(k, 4) for k in range(4)] == pytest.approx([1.0, 1.5, 2.0, 2.5])
    assert draw.scale(0, 1) == 1.0, "a single block must not divide by zero"
    assert draw.guided and not LogitSettings(0.0, "linear").guided and LogitSettings(1.0, "linear").guided
    conditional, free = torch.randn(2, 3), torch.randn(2, 3)
    t = 1.5 * 2 / 3
    by_hand = (1 + t) * conditional - t * free
    assert torch.allclose(guide(torch.cat([conditional, free]), draw.scale(2, 4)), by_hand, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_until_is_the_last_guided_block(schedule: Literal["constant", "linear"]) -> None:
    draw = LogitSettings(3.0, schedule, guidance_until=1)
    always = LogitSettings(3.0, schedule)
    assert [draw.scale(k, 4) for k in range(4)] == [always.scale(0, 4), always.scale(1, 4), 1.0, 1.0]
    assert LogitSettings(3.0, schedule, guidance_until=0).scale(1, 4) == 1.0


def test_without_a_schedules_name_the_valid_ones_are_told() -> None:
    with pytest.raises(InvalidRequestError, match="constant or linear") as caught:
        LogitSettings(2.0, "cosine")  # type: ignore[arg-type]
    assert caught.value.param == "guidance_schedule"


def test_top_k_keeps_ties_with_the_kth() -> None:
    assert _kept([3.0, 1.0, 2.0, 2.0, 0.0], top_k=2) == [0, 2, 3]
    assert _kept([3.0, 1.0, 2.0], top_k=0) == [0, 1, 2]
    assert _kept([3.0, 1.0, 2.0], top_k=99) == [0, 1, 2]


def test_top_p_keeps_the_token_that_crosses() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert _kept(p, top_p=0.4) == [0]
    assert _kept(p, top_p=0.6) == [0, 1]
    assert _kept(p, top_p=0.9) == [0, 1, 2]
    assert _kept(p, top_p=1e-6) == [0]


def test_temperature_sharpens() -> None:
    cold = log_probabilities(torch.tensor([1.0, 0.0]), LogitSettings(temperature=0.5)).exp()
    assert cold[0].item() == pytest.approx(torch.tensor(2.0).sigmoid().item())


def test_multinomial_inverts_the_distribution_function() -> None:
    log_p = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(6, -1)
    uniform = torch.tensor([1e-7, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 2.0**-24])
    assert multinomial(log_p, uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_multinomial_never_leaves_the_support() -> None:
    """The largest uniform number with a tail of excluded tokens: rounding must not step into it."""
    log_p = torch.randn(2000, 50)
    log_p[:, 25:] = -INF
    drawn = multinomial(log_p.log_softmax(-1), torch.full((2000,), 1 - 2.0**-24))
    assert drawn.max() < 25


@pytest.mark.parametrize(
    "wrong", [{"guidance": -1.0}, {"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_values_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        LogitSettings(**wrong)  # type: ignore[arg-type]
    assert caught.value.param == next(iter(wrong))
