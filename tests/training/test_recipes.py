"""Recipes and what the command line may change of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import TypeAdapter

from dd_core.bundle import DEFAULT_BUNDLE, DEFAULT_TEXT_BUNDLE
from dd_core.errors import RecipeError
from dd_core.flow import SOLVERS
from dd_core.hub.locate import locate
from dd_core.manifest import read_manifest
from training.recipes.named import RECIPES, get_recipe
from training.recipes.settings import Recipe, Solver

DOCS = Path(__file__).parent.parent.parent / "docs"
PARTS = ("tokenizer", "decoder", "teacher", "pairs", "distill", "evaluate")


def test_recipes_are_overridden_by_name() -> None:
    changed = get_recipe(
        "tiny", ["distill.steps=9", "distill.train_steps=[0, 8]", "tokenizer.lr=1", "seed=3"]
    )
    assert (changed.distill.steps, changed.distill.train_steps, changed.seed) == (9, (0, 8), 3)
    assert changed.tokenizer.lr == 1.0 and RECIPES["tiny"].distill.steps == 6
    words = get_recipe("tiny", ["distill.start=student", 'distill.optimizer="muon"', "begin_from=123"])
    assert (words.distill.start, words.distill.optimizer, words.begin_from) == ("student", "muon", "123")
    assert get_recipe("text-cpu", ["begin_from=null", "distill.start=teacher"]).begin_from is None


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("huge", "seed=1", "tiny, cpu"),
        ("tiny", "distill.stepz=3", "distill has no field 'stepz'; it has steps, batch"),
        ("tiny", "steps", "takes stage.field=value"),
        ("tiny", "a.b.c=1", "takes stage.field=value"),
        ("tiny", "nothing.steps=3", "has no part 'nothing'; it has tokenizer_model, model, tokenizer"),
        ("tiny", "tokenizer=3", "the recipe has no field 'tokenizer'; it has seed"),
        ("tiny", "name=mine", "the recipe has no field 'name'"),
        (
            "tiny",
            "data=imagefolder",
            "data must be 'cifar10', 'folder', 'pictograms' or 'none', not 'imagefolder'",
        ),
        ("tiny", "distill.start=studnet", "must be 'teacher', 'student' or 'transplant', not 'studnet'"),
        ("tiny", "pairs.solver=rk4", "must be 'euler', 'dpmpp-2m' or 'dpmpp-3m', not 'rk4'"),
        ("tiny", "distill.optimizer=sgd", "must be 'adamw' or 'muon', not 'sgd'"),
        ("tiny", "evaluate.precision=half", "must be 'float32', 'bfloat16' or 'auto', not 'half'"),
        ("tiny", "tokenizer.steps=-5", "tokenizer.steps must be greater than or equal to 0, not '-5'"),
        ("tiny", "distill.steps=many", "distill.steps must be a valid integer, not 'many'"),
        ("tiny", "distill.steps=6.5", "must be a valid integer, not '6.5'"),
        ("tiny", "distill.steps=true", "must be a valid integer, not 'true'"),
        ("tiny", "distill.layers=many", "distill.layers must be a valid integer"),
        ("tiny", "teacher.lr=NaN", "teacher.lr must be a finite number, not 'NaN'"),
        ("tiny", "teacher.lr=0", "teacher.lr must be greater than 0"),
        ("tiny", "teacher.ema=1", "teacher.ema must be less than 1"),
        ("tiny", "pairs.top_p=1.5", "pairs.top_p must be less than or equal to 1"),
        ("tiny", "log_every=0", "log_every must be greater than or equal to 1"),
        ("tiny", "seed=-1", "seed must be greater than or equal to 0"),
        ("tiny", "distill.train_steps=[]", "distill.train_steps"),
        ("tiny", "distill.train_steps=[0, 64]", r"distill.train_steps must be different steps of 0..63"),
        ("tiny", "distill.train_steps=0,20", "distill.train_steps must be a valid tuple"),
        ("tiny", "distill.split=65", "distill.split must be at most 64"),
        ("tiny", "distill.layers=1", "distill.layers must be at least the model's 2"),
        ("tiny", "distill.start=transplant", "begin_from must name a bundle"),
        ("tiny", "tokenizer_model.codebook_size=32", "model.codebook_size must be the tokenizer's, 32"),
        ("tiny", "model.layers=-1", "model.layers must be greater than or equal to 1, not '-1'"),
        ("tiny", "model.heads=0", "model.heads must be greater than or equal to 1"),
        ("tiny", "model.norm_eps=0", "model.norm_eps must be greater than 0"),
        (
            "tiny",
            "tokenizer_model.channel_multipliers=[0]",
            "tokenizer_model.channel_multipliers must be greater than or equal to 1",
        ),
        ("tiny", "model.heads=16", "model.heads must divide model.dim, 32, four times"),
        ("var-tiny", "model.heads=3", "model.heads must divide model.dim, 32"),
        ("tiny", "tokenizer_model.channels=48", "tokenizer_model.channels must be a multiple of 32, times"),
        ("text-tiny", "text.length=2", "text.length: an encoder has at least"),
        ("tiny", "model.num_classes=9", "model.num_classes must be 10"),
        ("tiny", "teacher.replaced=1.1", "teacher.replaced must be less than or equal to 1"),
        ("tiny", "data=pictograms", "data must be cifar10 or folder without text"),
        ("tiny", "evaluate.images=0", "evaluate.images must be at least 2"),
    ],
)
def test_wrong_recipes_are_explained(name: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        get_recipe(name, [override])
    assert message in caught.value.message and "\n" not in caught.value.message


def test_pages_start_from_built_in_models_with_recipes_of_their_architecture() -> None:
    """Commands that take too long for the tests of the pages, which run them with other models."""
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    names = f"{DEFAULT_BUNDLE}|{DEFAULT_TEXT_BUNDLE}"
    commands = re.findall(rf"dd-train start +({names}) +--recipe ([\w-]+)", text)
    commands += [
        (name, recipe) for recipe, name in re.findall(rf"--recipe ([\w-]+) --set begin_from=({names})", text)
    ]
    assert len(commands) >= 2
    for name, recipe in commands:
        manifest, wanted = read_manifest(locate(name)), get_recipe(recipe)
        assert (manifest.vq, manifest.teacher) == (wanted.tokenizer_model, wanted.model), (name, recipe)


def test_recipes_that_transplant_name_a_student_of_their_tokenizer() -> None:
    for recipe in RECIPES.values():
        if recipe.distill.start == "transplant":
            assert read_manifest(locate(str(recipe.begin_from))).vq == recipe.tokenizer_model, recipe.name


def _fields() -> list[tuple[type, str]]:
    """Every setting of the recipes' own stages, and of a recipe."""
    kinds = [Recipe, *(type(getattr(RECIPES["tiny"], part)) for part in PARTS)]
    return [
        (kind, field.name)
        for kind in kinds
        for field in dataclasses.fields(kind)
        if field.name not in (*PARTS, "tokenizer_model", "model", "text", "name")
    ]


@pytest.mark.parametrize(("kind", "name"), _fields(), ids=lambda value: getattr(value, "__name__", value))
def test_every_setting_has_bounds_or_choices(kind: type, name: str) -> None:
    """A number below zero, and a word that is no choice: no setting takes them but names."""
    adapter: TypeAdapter[Any] = TypeAdapter(get_type_hints(kind, include_extras=True)[name])
    wrong = [b"-1", b"[-1]", b"1e400", b"{}"]
    if name not in ("begin_from", "plans"):
        wrong += [b'"studnet"', b'["studnet"]']
    for value in wrong:
        with pytest.raises(ValueError, match=r".+"):
            adapter.validate_json(value, strict=True)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_keep_their_own_rules(name: str) -> None:
    recipe = get_recipe(name)
    for owner in (recipe, *(getattr(recipe, part) for part in PARTS)):
        for field, kind in get_type_hints(type(owner), include_extras=True).items():
            if not dataclasses.is_dataclass(value := getattr(owner, field)):
                TypeAdapter(kind).validate_python(value, strict=True)
    size = 64 if name.startswith("text-var") else 32
    assert recipe.image_size == (256 if recipe.data == "none" else size)
    assert recipe.model.head_dim % 4 == 0


def test_the_solvers_are_those_of_the_flow_map() -> None:
    assert set(get_args(Solver)) == set(SOLVERS)
