"""The discriminator, and a student that learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dd_core.codebook import lookup
from tests.training.helpers import pictures_like
from tests.training.test_stages import CPU, RandomLpips
from training.losses.adversarial import Adversary
from training.losses.lpips import Lpips
from training.optim.loop import run_stage
from training.recipes.named import get_recipe
from training.stages.distill import distill_stage, straight_through
from training.stages.pairs import Pairs
from training.stages.teacher import new_teacher
from training.stages.tokenizer import new_tokenizer


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    return RandomLpips(tmp_path_factory.mktemp("lpips"))


def test_the_discriminator_learns_to_tell_sharp_from_blurred(lpips: Lpips) -> None:
    """And its opinion has a gradient with respect to the picture, which is what a model follows."""
    sharp = pictures_like(16).float().div(127.5).sub(1)
    blurred = nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2).requires_grad_()
    adversary = Adversary(1e-3, 0, CPU)
    real, fake = lpips.features(sharp), lpips.features(blurred)
    losses = []
    for _ in range(60):  # a batch in two parts, of a quarter and the rest
        parts = (slice(4), 0.25), (slice(4, 16), 0.75)
        found = [
            adversary.learn(*([m[s].detach() for m in x] for x in (real, fake)), share=w) for s, w in parts
        ]
        losses.append(float(sum(found)))
        adversary.step(1.0)
    assert sum(losses[-10:]) / 10 < 0.95 * losses[0]
    assert blurred.grad is None
    assert adversary.fooled(fake).item() > adversary.fooled(real).item()
    adversary.fooled(fake).backward()  # type: ignore[no-untyped-call]
    assert blurred.grad is not None and blurred.grad.abs().sum() > 0


def test_what_a_model_follows_leaves_the_judge_alone(lpips: Lpips) -> None:
    picture = torch.rand(2, 3, 32, 32, requires_grad=True)
    adversary = Adversary(1e-3, 0, CPU)
    adversary.fooled(lpips.features(picture)).backward()  # type: ignore[no-untyped-call]
    assert picture.grad is not None
    assert all(p.grad is None and p.requires_grad for p in adversary.judge.parameters())


def test_tokens_pass_on_the_gradient_of_the_expected_code() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(7, 3, generator=generator)
    logits = torch.randn(2, 5, 7, generator=generator, requires_grad=True)
    weight = torch.randn(2, 5, 3, generator=generator)
    codes = straight_through(logits, codebook)
    assert torch.equal(codes.detach(), lookup(codebook, logits.argmax(-1)))
    (codes * weight).sum().backward()
    expected = logits.detach().clone().requires_grad_()
    ((expected.softmax(-1) @ codebook) * weight).sum().backward()
    assert expected.grad is not None and expected.grad.abs().max() > 0
    torch.testing.assert_close(logits.grad, expected.grad)


def test_a_student_follows_the_judge_alone(lpips: Lpips, tmp_path: Path) -> None:
    """With no other loss its logits move; the embedding head, of which no token is made, stays."""
    recipe = get_recipe("tiny")
    pairs = Pairs(torch.arange(32) % 10, torch.randint(64, (32, 64)), seed=5)
    tokenizer = new_tokenizer(recipe, CPU).eval().requires_grad_(False)
    settings = replace(
        recipe.distill, steps=4, ramp=0.25, cross_entropy=0.0, mse=0.0, lpips=0.0, adversarial=1.0
    )
    stage, _, student = distill_stage(
        replace(recipe, distill=settings), pairs, new_teacher(recipe, tokenizer, CPU), tokenizer, lpips, CPU
    )
    before = {k: v.clone() for k, v in student.state_dict().items()}
    run_stage(stage, tmp_path, seed=0)
    moved = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert {"output.weight", "norm.weight"} <= moved and any(k.startswith("layers.0.") for k in moved)
    assert not any(k.startswith("final_layer_conti") for k in moved)
