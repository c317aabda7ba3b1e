"""The discriminator, and a student that learns from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dd_core.codebook import lookup
from tests.training.helpers import pictures_like
from tests.training.test_stages import CPU, RandomLpips
from training.data.images import ImageSet
from training.losses.adversarial import Adversary
from training.losses.lpips import Lpips
from training.losses.perceptual import perceived
from training.optim.loop import run_stage
from training.recipes.named import get_recipe
from training.stages.distill import distill_stage, straight_through
from training.stages.pairs import Pairs
from training.stages.teacher import new_teacher
from training.stages.tokenizer import new_tokenizer, tokenizer_stage


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


def test_vgg_sees_pictures_as_large_as_it_is_told(lpips: Lpips) -> None:
    sharp = pictures_like(4).float().div(127.5).sub(1)
    drawn = nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1).requires_grad_()
    small, large = (perceived(lpips, None, sharp, drawn, 0.5, enlarged)["lpips"] for enlarged in (1, 2))
    by_hand = [nn.functional.interpolate(x, size=64, mode="bilinear") for x in (sharp, drawn)]
    torch.testing.assert_close(large, 0.5 * lpips(*by_hand).mean(), rtol=0.02, atol=0)  # one is of bfloat16
    assert abs(large / small - 1) > 0.05
    large.backward()
    assert drawn.grad is not None and drawn.grad.abs().sum() > 0
    judged = perceived(lpips, Adversary(1e-3, 0, CPU), sharp, drawn, 0.5, enlarged=2)
    assert set(judged) == {"lpips", "fooled", "hinge"} and not judged["hinge"].requires_grad


def test_unpaired_pictures_are_for_the_judge_alone(lpips: Lpips) -> None:
    real = pictures_like(4).float().div(127.5).sub(1)
    drawn, unpaired = real.flip(2).requires_grad_(), real.flip(3).mul(0.5).requires_grad_()
    alone, beside = (
        perceived(lpips, Adversary(1e-3, 0, CPU), real, drawn, 0.5, 1, u) for u in (None, unpaired)
    )
    torch.testing.assert_close(alone["lpips"], beside["lpips"], rtol=0.02, atol=0)
    assert alone["hinge"] != beside["hinge"] and alone["fooled"] != beside["fooled"]
    beside["lpips"].backward(retain_graph=True)
    assert unpaired.grad is not None and unpaired.grad.abs().sum() == 0
    beside["fooled"].backward()
    assert unpaired.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", ["lpips", "adversarial"])
def test_vgg_sees_a_students_pictures_as_large_as_it_is_told(loss: str, lpips: Lpips) -> None:
    tiny = get_recipe("tiny")
    tokenizer = new_tokenizer(tiny, CPU)
    tokens = torch.randint(64, (16, 64), generator=torch.Generator().manual_seed(3))
    teacher = new_teacher(tiny, tokenizer, CPU)

    def first(enlarged: int) -> dict[str, float]:
        cfg = replace(tiny.distill, **{"lpips": 0.0, "adversarial": 0.0, loss: 1.0}, enlarged=enlarged)
        pairs = Pairs(torch.arange(16) % 10, tokens, seed=1)
        stage, _, _ = distill_stage(replace(tiny, distill=cfg), pairs, teacher, tokenizer, lpips, CPU)
        torch.manual_seed(0)
        return {name: value.item() for name, value in stage.update(0).items()}

    small, large = first(1), first(2)
    name = {"lpips": "lpips", "adversarial": "hinge"}[loss]
    assert small["cross_entropy"] == large["cross_entropy"] and small[name] != large[name]


def test_a_tokenizer_meets_the_judge_where_the_recipe_says(lpips: Lpips, tmp_path: Path) -> None:
    """Up to there updates are the same whatever its weight; then encoder and decoder follow it."""
    tiny = get_recipe("tiny")
    images = ImageSet(pictures_like(64), torch.zeros(64, dtype=torch.long))

    def trained(weight: float, stop: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        cfg = replace(tiny.tokenizer, adversarial=weight, judged_from=0.5, ramp=0.0)
        stage, _ = tokenizer_stage(replace(tiny, tokenizer=cfg), images, lpips, CPU)
        folder = tmp_path / f"{weight}-{stop}"
        run_stage(stage, folder, seed=0, log_every=1, save_every=9, stop_after=stop)
        lines = (folder / "tokenizer.jsonl").read_text().splitlines()
        model = stage.parts["model"]
        assert isinstance(model, nn.Module)
        return model.state_dict(), [json.loads(line)["hinge"] for line in lines]

    before, hinge = trained(0.01, 3)
    assert hinge == [0, 0, 0]
    assert all(torch.equal(before[k], v) for k, v in trained(5.0, 3)[0].items())
    little, hinge = trained(0.01, 6)
    much, _ = trained(5.0, 6)
    assert hinge[:3] == [0, 0, 0] and all(h > 0.5 for h in hinge[3:])
    for part in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        assert not torch.equal(little[part], much[part])


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
