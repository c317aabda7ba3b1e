"""Pairs that begin with the student's own tokens: what they hold, and from which step they are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core import plan
from dd_core.codebook import nearest
from dd_core.condition import ClassCondition, Condition, of_kind
from dd_core.errors import RecipeError
from dd_core.flow import FlowSettings
from dd_core.models.llamagen import LlamaGenStudent
from dd_core.runtime import mixed_precision
from dd_core.sampling import Sampler, sample_codes
from training.recipes.named import get_recipe
from training.recipes.settings import Recipe
from training.run import Run
from training.stages import own_pairs
from training.stages.distill import distill_stage, student_from_teacher
from training.stages.pairs import Pairs, load_pairs, make_pairs
from training.stages.teacher import new_teacher
from training.stages.tokenizer import new_tokenizer

CPU = torch.device("cpu")
_BEGIN = 20


@pytest.fixture
def recipe() -> Recipe:
    return get_recipe("tiny")


@pytest.fixture
def sampler(recipe: Recipe) -> Sampler:
    tokenizer = new_tokenizer(recipe, CPU)
    teacher = new_teacher(recipe, tokenizer, CPU).eval()
    teacher.output.weight.data.mul_(20)
    student = student_from_teacher(teacher, tokenizer.codebook_VC.detach(), 1).eval()
    flow = FlowSettings(recipe.pairs.solver, recipe.pairs.evaluations)
    draw = recipe.pairs.draw_settings
    return Sampler(recipe.model.layout, tokenizer, student, teacher, draw=draw, flow=flow, exact=False)


@torch.inference_mode()
def test_the_student_begins_and_the_teacher_goes_on(recipe: Recipe, sampler: Sampler, tmp_path: Path) -> None:
    make_pairs(sampler, recipe.pairs, 10, tmp_path, seed=4, identity="x", begin=_BEGIN)
    pairs = load_pairs(tmp_path)
    assert pairs.begin == _BEGIN and pairs.tokens.shape == (48, 64)
    count = recipe.pairs.batch
    keys, classes = [(4, i) for i in range(count)], pairs.labels[:count]

    def tokens(chosen: plan.Plan) -> Tensor:
        with mixed_precision(CPU):  # as pairs are made
            codes = sample_codes(sampler, chosen, classes, keys)
        return nearest(sampler.codebook_VC, codes.float())

    found, alone = pairs.tokens[:count].long(), tokens(plan.one_step(64))
    assert torch.equal(found[:, :_BEGIN], alone[:, :_BEGIN])
    assert not torch.equal(found[:, _BEGIN:], alone[:, _BEGIN:])
    goes_on = tokens(
        plan.Plan("x", (plan.Segment("student", 0, 20), plan.Segment("teacher", 20, 64)), "flow")
    )
    assert torch.equal(found, goes_on)
    with pytest.raises(RecipeError, match="other settings"):
        make_pairs(sampler, recipe.pairs, 10, tmp_path, seed=4, identity="x")


def test_they_are_shown_from_the_students_last_token_on(
    recipe: Recipe, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it the target is what the student made itself, which it must not learn as the teacher's."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (64, 64), generator=generator)
    pairs, own = Pairs(torch.full((64,), 2), tokens, seed=5), Pairs(torch.full((64,), 7), tokens, 6, _BEGIN)
    seen: list[tuple[int, int]] = []
    forward = LlamaGenStudent.forward

    def spy(
        student: LlamaGenStudent, x_BLC: Tensor, cond: Condition, step_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        labels_B = of_kind(cond, ClassCondition).labels_B
        seen.extend(zip(labels_B.tolist(), step_B.tolist(), strict=True))
        return forward(student, x_BLC, cond, step_B)

    monkeypatch.setattr(LlamaGenStudent, "forward", spy)
    settings = replace(recipe.distill, lpips=0.0, train_steps=(0, _BEGIN))
    teacher, tokenizer = sampler.teacher, sampler.tokenizer
    stage, _, _ = distill_stage(
        replace(recipe, distill=settings),
        pairs,
        teacher,  # type: ignore[arg-type]
        tokenizer,  # type: ignore[arg-type]
        None,
        CPU,
        own=own,
    )
    for step in range(24):
        stage.update(step)
    assert set(seen) == {(2, 0), (2, _BEGIN), (7, _BEGIN)}
    assert stage.config["own"] == 64


def test_what_they_need_is_explained(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pairs\.own"):
        own_pairs.run(Run(recipe, tmp_path, CPU))
    one_step = get_recipe("tiny", ["pairs.own=16", "distill.train_steps=[0]"])
    with pytest.raises(RecipeError, match="later step"):
        own_pairs.run(Run(one_step, tmp_path, CPU))
