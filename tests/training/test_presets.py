"""Which plans a recipe measures and offers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dd_core.errors import RecipeError
from training.presets import presets, renamed
from training.recipes.named import get_recipe


def test_a_recipe_without_a_choice_has_all_plans_and_baselines() -> None:
    found = presets(get_recipe("tiny"))
    assert [p.plan.name for p in found if p.offered] == [
        "dd-1",
        "dd-2",
        "pre-trained-14-21",
        "pre-trained-7-21",
        "pre-trained-1-21",
        "teacher",
    ]
    assert [p.plan.name for p in found if not p.offered] == ["teacher-multinomial", "skip-26", "onestep"]


def test_a_bundle_offers_what_the_recipe_chooses_only() -> None:
    chosen = get_recipe("tiny", ['evaluate.plans=["teacher", "dd-1", "onestep"]'])
    assert [(p.plan.name, p.offered) for p in presets(chosen)] == [
        ("dd-1", True),
        ("teacher", True),
        ("onestep", False),
    ]


def test_a_plan_that_there_is_not_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no plan 'dd1'; choose from dd-1, dd-2"):
        presets(get_recipe("tiny", ['evaluate.plans=["dd-1", "dd1"]']))


@pytest.mark.parametrize(
    ("name", "side", "steps", "expected"),
    [
        ("var-cpu", 16, (0, 5), ("dd-1", "dd-2", "pre-trained-1-6", "teacher", "skip-4", "onestep")),
        ("text-cpu", 16, (0, 80), ("dd-1", "dd-2", "pre-trained-1-81", "teacher")),
        ("var-cpu", 8, (0, 3), ("dd-1", "dd-2", "pre-trained-1-4", "teacher", "skip-2", "onestep")),
    ],
)
def test_plans_to_measure_are_those_of_another_size(
    name: str, side: int, steps: tuple[int, ...], expected: tuple[str, ...]
) -> None:
    recipe = get_recipe(name)
    made = replace(
        recipe, model=recipe.model.with_side(side), distill=replace(recipe.distill, train_steps=steps)
    )
    assert renamed(recipe, made) == expected
    unknown = replace(recipe, evaluate=replace(recipe.evaluate, plans=("dd1",)))
    assert renamed(unknown, made) == ("dd1",)  # for `presets` to refuse


def test_frequencies_of_tokens_are_no_baseline_for_texts() -> None:
    assert not {"skip-26", "onestep"} & {p.plan.name for p in presets(get_recipe("text-tiny"))}


def test_a_published_student_has_the_plans_of_table_2_with_their_splits() -> None:
    found = {p.plan.name: p.plan for p in presets(get_recipe("var-dd-d16"))}
    splits = {"dd-1": 5, "dd-2": 5, "pre-trained-5-6": 5, "pre-trained-4-6": 8, "pre-trained-1-6": 9}
    assert {name: found[name].split for name in splits} == splits
    other = {p.plan.name for p in presets(get_recipe("var-dd-d16", ["distill.train_steps=[0, 4]"]))}
    assert "pre-trained-1-5" in other and "pre-trained-4-6" not in other
