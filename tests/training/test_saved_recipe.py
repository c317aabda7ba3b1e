"""`recipe.json`: what a run remembers, what may still change, and stages that go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dd_core.errors import RecipeError
from training.data.packages import DataError
from training.metrics import plots
from training.recipes.choose import choose_recipe
from training.recipes.named import DEFAULT, RECIPES, get_recipe
from training.recipes.saved import check_changes, read_recipe, remembered
from training.recipes.settings import Recipe
from training.run import Run
from training.stages.order import STAGES

CPU = torch.device("cpu")
SHORT = ["tokenizer.steps=2", "teacher.steps=2", "pairs.count=16", "distill.steps=2", "distill.lpips=0.0"]


@pytest.fixture(autouse=True)
def _surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))


def command(out: Path, *stages: str, recipe: str | None = None, overrides: list[str] | None = None) -> Recipe:
    """As the command line does it."""
    chosen = choose_recipe(out, recipe, overrides or [])
    out.mkdir(exist_ok=True)
    with remembered(out, chosen):
        for stage in stages:
            STAGES[stage](Run(chosen, out, CPU))
    return chosen


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    with remembered(tmp_path, RECIPES[name]):
        pass
    assert read_recipe(tmp_path) == RECIPES[name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": "x"}, "seed: Input should be a valid integer"),
        ({"sede": 1}, "sede: Unexpected keyword argument"),
        ({"teacher": {"steps": 1}}, "teacher.batch: Field required"),
        ({"decoder": {"steps": 1, "batch": 1, "lrr": 1}}, "decoder.lrr: Unexpected keyword argument"),
        ({"model": {"grit": 8}}, "model.*grit: Unexpected keyword argument"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(
    change: dict[str, object], says: str, tmp_path: Path
) -> None:
    with remembered(tmp_path, RECIPES["tiny"]):
        pass
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RecipeError, match=says) as caught:
        choose_recipe(tmp_path, None)
    assert str(path) in caught.value.message and "\n" not in caught.value.message


def test_a_run_says_where_it_is_not_as_its_recipe_is_today(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dd_train")
    command(tmp_path, "tokenizer", recipe="tiny", overrides=["tokenizer.steps=2"])
    assert not any("keeps settings" in line for line in caplog.messages)
    command(tmp_path, overrides=["pairs.guidance=3.5"])
    assert not any("keeps settings" in line for line in caplog.messages), "no recipe was named"
    command(tmp_path, recipe="tiny")
    [said] = [line for line in caplog.messages if "keeps settings" in line]
    assert said.startswith(f"{tmp_path} keeps settings that are not the recipe tiny's: ")
    assert f"tokenizer.steps 2 (there {RECIPES['tiny'].tokenizer.steps})" in said
    assert f"pairs.guidance 3.5 (there {RECIPES['tiny'].pairs.guidance})" in said


def test_the_default_is_for_a_folder_without_a_recipe(tmp_path: Path) -> None:
    assert choose_recipe(tmp_path, None) == RECIPES[DEFAULT]


def test_what_a_refused_command_asked_for_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="run `dd-train tokenizer"):
        command(tmp_path, "teacher", recipe="tiny")
    assert read_recipe(tmp_path) is None
    command(tmp_path, recipe="tiny", overrides=["seed=3"])
    with pytest.raises(RecipeError):
        command(tmp_path, "teacher", overrides=["seed=4"])
    assert read_recipe(tmp_path) == get_recipe("tiny", ["seed=3"])


def test_what_stages_have_gone_by_is_kept_when_a_later_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="run `dd-train teacher"):
        command(tmp_path, "tokenizer", "pairs", recipe="tiny", overrides=[*SHORT, "seed=3"])
    assert read_recipe(tmp_path) == get_recipe("tiny", [*SHORT, "seed=3"])
    with pytest.raises(RecipeError, match="run the pairs stage"):  # the teacher has gone on
        command(tmp_path, "teacher", "distill", overrides=["teacher.steps=3"])
    assert command(tmp_path, "teacher").teacher.steps == 3


def test_a_recipe_can_be_replaced_until_a_stage_has_begun(tmp_path: Path) -> None:
    command(tmp_path, recipe="tiny", overrides=SHORT)
    assert command(tmp_path, recipe="var-tiny") == RECIPES["var-tiny"]
    command(tmp_path, "tokenizer", recipe="tiny", overrides=SHORT)
    with pytest.raises(RecipeError, match="begun with the recipe 'tiny', not 'var-tiny'"):
        command(tmp_path, recipe="var-tiny")
    assert command(tmp_path, recipe="tiny") == get_recipe("tiny", SHORT), "its changes last"


@pytest.fixture(scope="module")
def begun(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has pairs."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DD_CACHE", str(cache))
        patch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
        patch.setattr(plots, "loss_curve", lambda *_: None)
        command(out, "tokenizer", "teacher", "pairs", recipe="tiny", overrides=SHORT)
    return out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("teacher.lr=0.5", r"teacher\.pt with teacher\.lr 0\.001, not 0\.5; choose another --out"),
        ("teacher.steps=1", r"teacher\.pt with teacher\.steps 2, not 1"),
        ("tokenizer.steps=+1", r"tokenizer\.steps cannot grow any more: .* has teacher\.pt, made of what"),
        ("teacher.steps=+1", r"teacher\.steps cannot grow any more: .* has pairs/manifest\.json, made of"),
        ("pairs.guidance=3", r"pairs/manifest\.json with pairs\.guidance 2\.0, not 3\.0"),
        ("pairs.count=+1.5", r"pairs\.count must be a valid integer, not '\+1\.5'"),
        ("teacher.lr=+1", r"teacher\.lr must be a valid number, not '\+1'"),
    ],
)
def test_settings_of_a_stage_that_has_begun_stay(override: str, says: str, begun: Path) -> None:
    before = read_recipe(begun)
    with pytest.raises(RecipeError, match=says) as caught:
        command(begun, overrides=[override])
    assert "\n" not in caught.value.message and read_recipe(begun) == before


def test_settings_of_later_stages_may_change_and_pairs_may_grow(begun: Path) -> None:
    overrides = ["pairs.count=+8", "pairs.own=4", "distill.lr=0.5", "evaluate.images=20", "save_every=1"]
    chosen = command(begun, "pairs", overrides=overrides)
    assert (chosen.pairs.count, chosen.distill.lr, chosen.evaluate.images) == (24, 0.5, 20)
    assert read_recipe(begun) == chosen


def test_what_a_command_that_failed_asked_for_is_forgotten(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a `+N` would count once more with each try."""
    before = read_recipe(begun)

    def fails(_: Run) -> None:
        raise DataError("LPIPS cannot be had", param="lpips")

    monkeypatch.setitem(STAGES, "decoder", fails)
    for _ in range(2):
        with pytest.raises(DataError):
            command(begun, "decoder", overrides=["decoder.steps=+7"])
    assert read_recipe(begun) == before


def test_pairs_take_another_batch(begun: Path) -> None:
    """As after a GPU's memory was too small."""
    before = read_recipe(begun)
    assert before is not None
    check_changes(begun, before, replace(before, pairs=replace(before.pairs, batch=3)))


def test_only_what_nothing_was_made_of_may_grow(tmp_path: Path) -> None:
    """The decoder, which the later stages do not read, and the pairs that begin with a student's tokens."""
    for name in ("tokenizer.pt", "decoder.pt", "teacher.pt", "student.pt"):
        (tmp_path / name).touch()
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "manifest.json").touch()
    before = get_recipe("tiny")
    for free in ("decoder.steps=+1", "distill.steps=+1", "pairs.own=+1", "evaluate.batch=1"):
        check_changes(tmp_path, before, get_recipe("tiny", [free]))
    for used, by in (
        ("tokenizer.steps", "decoder.pt"),
        ("teacher.steps", "pairs"),
        ("pairs.count", "student"),
    ):
        with pytest.raises(RecipeError, match=f"{used} cannot grow any more: .* has {by}"):
            check_changes(tmp_path, before, get_recipe("tiny", [f"{used}=+1"]))


def test_a_finished_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    command(tmp_path, "tokenizer", "teacher", recipe="tiny", overrides=SHORT)
    first = load_file(tmp_path / "teacher.safetensors")
    command(tmp_path, "teacher", overrides=["teacher.steps=+3"])
    journal = [json.loads(line)["step"] for line in (tmp_path / "teacher.jsonl").read_text().splitlines()]
    assert journal == [2, 4, 5], "the first two steps were not made again"
    longer = load_file(tmp_path / "teacher.safetensors")
    assert any(not torch.equal(longer[key], value) for key, value in first.items())
    recipe = read_recipe(tmp_path)
    assert recipe is not None and recipe.teacher.steps == 5
