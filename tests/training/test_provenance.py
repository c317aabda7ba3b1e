"""Whose weights a stage goes by: those that it was made of, finished, and not replaced behind its back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dd_core.bundle import load_bundle
from dd_core.errors import RecipeError
from tests.training.fakes import Mean
from training.cli import app
from training.metrics import plots
from training.metrics.report import Row
from training.metrics.rows import once, read_rows
from training.recipes.named import RECIPES, get_recipe
from training.run import Run, load_teacher, load_tokenizer, measuring_seed, save
from training.stages import distill, evaluate, export, pairs
from training.stages import teacher as teaching
from training.stages import tokenizer as tokenizing
from training.stages.order import STAGES, run_all
from training.stages.tokens import read_tokens, write_tokens
from training.start import start_from

CPU = torch.device("cpu")
SHORT = ["tokenizer.steps=2", "teacher.steps=2", "pairs.count=16", "distill.steps=2", "decoder.steps=0"]
SHORT += ["distill.lpips=0.0", 'evaluate.plans=["dd-1"]']
ROW = Row("dd-1", "plan", 100, 50, 1.0, None, None, None, None, 0)


@pytest.fixture(autouse=True)
def _surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
    monkeypatch.setattr(plots, "loss_curve", lambda *_: None)


@pytest.fixture(scope="module")
def distilled(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose student is there."""
    run = Run(get_recipe("tiny", SHORT), tmp_path_factory.mktemp("run"), CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DD_CACHE", str(cache))
        patch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
        patch.setattr(plots, "loss_curve", lambda *_: None)
        for stage in ("tokenizer", "teacher", "pairs", "distill"):
            STAGES[stage](run)
    return run


def _copy(run: Run, out: Path, *overrides: str, without: tuple[str, ...] = ()) -> Run:
    shutil.copytree(run.out, out, ignore=shutil.ignore_patterns(*without))
    return replace(run, out=out, recipe=get_recipe("tiny", [*SHORT, *overrides]))


def test_a_teacher_that_has_gone_on_is_not_that_of_the_pairs(distilled: Run, tmp_path: Path) -> None:
    run = _copy(distilled, tmp_path / "run", "teacher.steps=4")
    teaching.run(run)
    for stage in (distill.run, lambda r: evaluate.run(r, Mean(), timing=False)):
        with pytest.raises(RecipeError, match="holds pairs of another teacher than the run has now"):
            stage(run)


def test_pairs_wait_for_the_end_of_a_teacher_that_goes_on(distilled: Run, tmp_path: Path) -> None:
    run = _copy(distilled, tmp_path / "run", "teacher.steps=4", without=("student*", "pairs"))
    teaching.run(replace(run, stop_after=1))
    with pytest.raises(RecipeError, match="of 2 steps, and 4 were asked for: run `dd-train t") as short:
        pairs.run(run)
    assert short.value.param == "teacher.steps"
    teaching.run(run)
    pairs.run(run)


def test_a_teacher_waits_for_the_tokens_of_its_tokenizer(distilled: Run, tmp_path: Path) -> None:
    """The tokenizer went on, and was killed before it had encoded the images."""
    run = _copy(distilled, tmp_path / "run", without=("teacher*", "student*", "pairs"))
    tokenizer = load_tokenizer(run)
    read_tokens(run, tokenizer)
    next(tokenizer.parameters()).data += 1
    save(run, "tokenizer", tokenizer)
    with pytest.raises(RecipeError, match="codes of another tokenizer than the run has now: run"):
        teaching.run(run)
    write_tokens(run)
    read_tokens(run, load_tokenizer(run))


def test_models_that_were_given_stay(
    distilled: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export.run_teacher(distilled, "mine", tmp_path / "bundle")
    run = replace(distilled, out=tmp_path / "run")
    start_from(run, tmp_path / "bundle")
    before = {n: (run.out / f"{n}.safetensors").read_bytes() for n in ("tokenizer", "teacher", "tokens")}
    for name, stage in (("tokenizer", tokenizing.run), ("teacher", teaching.run)):
        with pytest.raises(
            RecipeError, match=rf"a {name}\.safetensors that was not trained there; remove it"
        ):
            stage(run)
    caplog.set_level("INFO", "dd_train")
    with pytest.MonkeyPatch.context() as patch:
        for later in ("decoder", "distill", "evaluate"):
            patch.setitem(STAGES, later, lambda _: None)
        run_all(run)
    assert (run.out / "pairs" / "manifest.json").exists()
    assert before == {name: (run.out / f"{name}.safetensors").read_bytes() for name in before}
    assert any("teacher.safetensors was not trained here, and stays" in line for line in caplog.messages)


def test_a_teacher_of_ones_own_becomes_a_bundle(distilled: Run, tmp_path: Path) -> None:
    """Files put into a folder, of a recipe without images, and no bundle anywhere."""
    recipe = replace(distilled.recipe, data="none", train_images=0)
    run = Run(recipe, tmp_path / "run", CPU)
    run.out.mkdir()
    for name in ("tokenizer", "teacher"):
        save_file(load_file(distilled.out / f"{name}.safetensors"), run.out / f"{name}.safetensors")
    pairs.run(run)
    distill.run(run)
    manifest = export.run(run, "mine", tmp_path / "bundle")
    assert manifest.classes == [str(number) for number in range(10)]
    assert manifest.licence == "that of the teacher's weights"
    assert load_bundle(tmp_path / "bundle", CPU).sampler.student is not None


def test_figures_that_do_not_say_their_weights_are_none_of_a_bundles(tmp_path: Path) -> None:
    weights = {"tokenizer": "a", "student": "b"}
    once(tmp_path / "dd-1.json", "x", lambda: ROW)
    with pytest.raises(RecipeError, match="figures of dd-1 are of other weights"):
        read_rows(tmp_path, weights, ["dd-1"])
    once(tmp_path / "dd-1.json", "x", lambda: ROW, weights)
    assert read_rows(tmp_path, weights, ["dd-1"]) == [ROW]


def test_figures_of_unequal_numbers_of_images_do_not_compare(tmp_path: Path) -> None:
    weights = {"student": "b"}
    once(tmp_path / "dd-1.json", "x", lambda: ROW, weights)
    once(tmp_path / "dd-2.json", "x", lambda: replace(ROW, name="dd-2", images=50), weights)
    once(tmp_path / "real.json", "x", lambda: replace(ROW, name="real", kind="real", images=7))
    assert len(read_rows(tmp_path, weights, ["dd-1"])) == 2
    with pytest.raises(
        RecipeError, match="unequal numbers of images: dd-1 100 against 50, dd-2 50 against 50"
    ):
        read_rows(tmp_path, weights, ["dd-1", "dd-2"])


def test_noise_to_measure_by_is_that_of_no_pairs() -> None:
    """Legs of a run have seeds beside each other, and so have their pairs."""
    recipes = [replace(RECIPES["tiny"], seed=seed) for seed in range(20)]
    measured = {measuring_seed(r, what) for r in recipes for what in ("evaluation", "choice")}
    assert len(measured) == 40 and min(measured) > 100 and max(measured) < 2**53


@pytest.mark.parametrize(
    "option", [["--images", "500"], ["--plans", "dd-1"], ["--no-timing"], ["--seed", "5"]]
)
def test_what_a_runs_own_evaluation_does_not_take_is_refused(option: list[str], tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["evaluate", "--out", str(tmp_path / "run"), *option])
    assert isinstance(found.exception, RecipeError)
    name = option[0].removeprefix("--no-").removeprefix("--")
    assert found.exception.param == name
    assert f"--{name} goes with --reference" in found.exception.message
    assert not (tmp_path / "run").exists()


def test_the_teacher_of_the_pairs_is_told_by_its_weights(distilled: Run) -> None:
    tokenizer = load_tokenizer(distilled)
    maker = pairs.maker_of(load_teacher(distilled, tokenizer), tokenizer)
    facts = json.loads((distilled.out / "pairs" / "manifest.json").read_text())
    assert facts["made_with"]["weights"] == maker
