"""The whole pipeline, from images to a bundle that can be served, at tiny size."""

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
from dd_core.models.config import LlamaGenConfig
from dd_core.plan import plan_for_budget
from dd_core.sampling import sample_images
from tests.training.fakes import Mean
from tests.training.runs import finished_run
from training import run as training_run
from training.cli import app, main
from training.metrics import plots
from training.metrics.plots import loss_curve
from training.recipes.named import get_recipe
from training.run import Run, load_teacher, load_tokenizer
from training.stages import decoder, distill, evaluate, export, own_pairs, pairs
from training.stages import teacher as teaching
from training.stages.pairs import load_pairs
from training.start import start_from

CPU = torch.device("cpu")


def _drawn_once(journal: Path, path: Path) -> None:
    """The tokenizer's loss curves, and an empty file for others': to draw takes longer than the updates."""
    if path.name.startswith("tokenizer"):
        loss_curve(journal, path)
    else:
        path.touch()


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DD_CACHE", str(cache))
        patch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
        patch.setattr(plots, "loss_curve", _drawn_once)
        return finished_run("tiny", tmp_path_factory.mktemp("run"))


def test_every_stage_leaves_its_files(run: Run) -> None:
    names = {p.name for p in run.out.iterdir()}
    for stage in ("tokenizer", "decoder", "teacher", "student"):
        needed = {f"{stage}.safetensors", f"{stage}.jsonl", f"{stage}-loss.png", f"{stage}-samples.png"}
        assert needed <= names
    assert (run.out / "tokenizer-loss.png").stat().st_size > 1000
    assert {"tokens.safetensors", "pairs", "evaluation"} <= names


def test_the_table_has_a_row_for_every_plan_and_for_real_images(run: Run) -> None:
    rows = {
        r["name"]: r for r in json.loads((run.out / "evaluation" / "evaluation.json").read_text())["rows"]
    }
    plans = {"dd-1", "dd-2", "teacher", "teacher-multinomial", "skip-26", "onestep", "pre-trained-1-21"}
    assert plans | {"reconstruction", "real-test", "real-split"} <= set(rows)
    assert {rows[n]["passes"] for n in ("dd-1", "dd-2", "pre-trained-1-21", "teacher")} == {1, 2, 21, 64}
    assert "| dd-1 |" in (run.out / "evaluation" / "evaluation.md").read_text()


def test_the_bundle_serves_what_was_trained(run: Run, tmp_path: Path) -> None:
    manifest = export.run(run, "tiny", tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle", CPU)
    assert bundle.manifest == manifest and bundle.manifest.training["name"] == "tiny"
    measured = {p.plan.name: p.fid for p in bundle.presets}
    assert all(measured[n] is not None for n in ("dd-1", "dd-2", "teacher", "onestep"))
    assert bundle.manifest.metrics["reconstruction"]["images"] == 16
    for budget in (1, 2, 64):
        chosen = plan_for_budget(bundle.presets, budget).plan
        assert chosen.cost <= budget
    picture = sample_images(bundle.sampler, plan_for_budget(bundle.presets, 1).plan, [0], [(0, 0)])
    assert picture.shape == (1, 32, 32, 3)


def test_a_bundle_says_nothing_of_plans_that_were_not_chosen(run: Run, tmp_path: Path) -> None:
    """Although the run folder holds their figures."""
    chosen = Run(get_recipe("tiny", ['evaluate.plans=["dd-1", "onestep"]']), run.out, CPU)
    manifest = export.run(chosen, "tiny", tmp_path / "bundle")
    assert [entry.name for entry in manifest.presets] == ["dd-1", "onestep"]
    assert set(manifest.metrics) == {"reconstruction", "real-test", "real-split", "another-seed"}


def test_figures_of_a_student_that_has_gone_on_are_not_the_bundles(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
    shutil.copytree(run.out, tmp_path / "longer")
    longer = Run(get_recipe("tiny", ["distill.steps=8"]), tmp_path / "longer", CPU)
    distill.run(longer)
    with pytest.raises(RecipeError, match=r"figures of .*dd-1, dd-2.* are of other weights") as refused:
        export.run(longer, "tiny", tmp_path / "bundle")
    assert "teacher" not in refused.value.message.partition("are of")[0].replace("pre-trained", "")
    evaluate.run(longer, extractor=Mean(), timing=False)
    assert {p.name for p in export.run(longer, "tiny", tmp_path / "bundle").presets} >= {"dd-1", "teacher"}


def test_a_bundle_says_how_near_pictures_of_two_seeds_are(run: Run, tmp_path: Path) -> None:
    """Sixteen pictures of ten classes have no two of each: the teacher drew ten more, of another seed."""
    folder = run.out / "evaluation"
    own, more = (
        load_file(each / "samples" / "teacher.safetensors") for each in (folder, folder / "another-seed")
    )
    assert len(own["images"]) == 16 and more["labels"].tolist() == list(range(10))
    assert not (own["images"][:10] == more["images"]).flatten(1).all(1).any()
    found = json.loads((folder / "evaluation.json").read_text())["settings"]["another_seed"]
    assert found["teacher_lpips"] > 0 and set(found) == {"teacher_lpips", "same_answer", "same_colour"}
    manifest = export.run(run, "tiny", tmp_path / "bundle")
    assert manifest.metrics["another-seed"] == found


def test_distillation_judges_pictures_of_the_decoder_that_draws(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of stage (a′), not of stage (a): with another (a′) the same student looks different, no more."""
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))

    def figures(out: Path) -> dict[str, float]:
        (out / "student.pt").unlink()
        distill.run(replace(run, out=out))
        first: dict[str, float] = json.loads((out / "student.jsonl").read_text().splitlines()[0])
        return first

    shutil.copytree(run.out, tmp_path / "same")
    shutil.copytree(run.out, tmp_path / "other")
    shutil.copy(run.out / "tokenizer.safetensors", tmp_path / "other" / "decoder.safetensors")
    same, other = figures(tmp_path / "same"), figures(tmp_path / "other")
    assert abs(same["lpips"] / other["lpips"] - 1) > 0.05
    assert same["cross_entropy"] == pytest.approx(other["cross_entropy"], rel=1e-3)
    (tmp_path / "other" / "decoder.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"dd-train decoder .* first"):
        distill.run(replace(run, out=tmp_path / "other"))


def test_a_run_can_start_from_a_bundle(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle's weights (as float16 holds them), its tokens, and stages that go on from there."""
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
    export.run(run, "tiny", tmp_path / "bundle")
    again = Run(get_recipe("tiny", ["distill.start=student", "pairs.own=20"]), tmp_path / "again", CPU)
    again.out.mkdir()
    start_from(again, tmp_path / "bundle")
    drawn, student = load_file(run.out / "decoder.safetensors"), load_file(run.out / "student.safetensors")
    found = load_file(again.out / "tokenizer.safetensors")
    assert all(torch.equal(found[k], v.half().float()) for k, v in drawn.items())
    found = load_file(again.out / "first-student.safetensors")
    assert all(torch.equal(found[k], v.half().float()) for k, v in student.items())
    assert load_file(again.out / "tokens.safetensors")["tokens"].shape == (2, 256, 64)
    shown = replace(again, recipe=replace(again.recipe, decoder=replace(again.recipe.decoder, drawn=1.0)))
    with pytest.raises(RecipeError, match=r"pairs holds no complete set of pairs; run the pairs stage"):
        decoder.run(shown)
    pairs.run(again)
    decoder.run(shown)
    assert (again.out / "decoder.safetensors").exists()
    with pytest.raises(RecipeError, match="own-pairs holds no complete set"):
        distill.run(again)
    own_pairs.run(again)
    assert load_pairs(again.out / "own-pairs").tokens.shape == (20, 64)
    distill.run(again)
    assert (again.out / "student.safetensors").exists()
    with pytest.raises(RecipeError, match="has a tokenizer already"):
        start_from(again, tmp_path / "bundle")
    other = Run(get_recipe("cpu"), tmp_path / "other", CPU)
    with pytest.raises(
        RecipeError, match=r"another architecture .*: tokenizer_model\.codebook_size is 64, not 1024$"
    ):
        start_from(other, tmp_path / "bundle")


def test_a_run_can_start_on_the_tokenizer_of_another(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))
    again = Run(run.recipe, tmp_path / "again", CPU)
    start_from(again, run.out)
    for name in ("tokenizer", "tokens"):
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (again.out, run.out))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert not (again.out / "teacher.safetensors").exists()
    other = replace(run.recipe, tokenizer_model=replace(run.recipe.tokenizer_model, channels=64))
    with pytest.raises(RecipeError, match=r"tokenizer\.safetensors was made with other settings: channels"):
        start_from(Run(other, tmp_path / "other", CPU), run.out)


def test_a_teacher_goes_elsewhere_without_a_student_and_is_trained_on_there(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))
    for name in ("tokenizer", "decoder", "teacher"):
        (tmp_path / "here").mkdir(exist_ok=True)
        shutil.copy(run.out / f"{name}.safetensors", tmp_path / "here")
    here = Run(replace(run.recipe, begin_from=str(tmp_path / "earlier")), tmp_path / "here", CPU)
    manifest = export.run_teacher(here, "mine", tmp_path / "bundle")
    assert manifest.training["begin_from"] == "earlier", "and not where it lies on this machine"
    assert manifest.student is None and {p.name for p in manifest.presets if p.offered} == {"teacher"}
    bundle = load_bundle(tmp_path / "bundle", CPU)
    (chosen,) = [p.plan for p in bundle.presets if p.offered]
    assert sample_images(bundle.sampler, chosen, [0], [(0, 0)]).shape == (1, 32, 32, 3)
    there = Run(
        get_recipe("tiny", ["seed=5", f"begin_from={tmp_path / 'bundle'}"]),
        tmp_path / "there",
        CPU,
        stop_after=1,
    )
    start_from(there, tmp_path / "bundle")
    brought = load_file(there.out / "teacher.safetensors")
    teaching.run(there)
    average = torch.load(there.out / "teacher.pt", weights_only=True)["parts"]["ema"]["average"]
    fresh = teaching.new_teacher(there.recipe, load_tokenizer(there), CPU).state_dict()
    for key in ("tok_embeddings.weight", "output.weight"):
        begun, anew = ((average[key] - v[key]).abs().mean() for v in (brought, fresh))
        assert begun < 0.2 * anew


def test_a_student_can_be_made_deeper_than_its_teacher(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a bundle's student to one of more blocks, to a bundle, and on from there."""
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
    export.run(run, "tiny", tmp_path / "shallow")
    deeper = Run(
        get_recipe("tiny", ["distill.start=student", "distill.layers=3", "decoder.steps=0"]),
        tmp_path / "deeper",
        CPU,
    )
    start_from(deeper, tmp_path / "shallow")
    pairs.run(deeper)
    distill.run(deeper)
    evaluate.run(deeper, extractor=Mean(), timing=False)
    manifest = export.run(deeper, "deeper", tmp_path / "bundle")
    assert isinstance(manifest.student, LlamaGenConfig) and isinstance(manifest.teacher, LlamaGenConfig)
    assert (manifest.student.layers, manifest.teacher.layers) == (3, 2)
    bundle = load_bundle(tmp_path / "bundle", CPU)
    for budget in (2, 21):  # the student alone, and going on behind the teacher
        chosen = plan_for_budget(bundle.presets, budget).plan
        assert sample_images(bundle.sampler, chosen, [0], [(0, 0)]).shape == (1, 32, 32, 3)
    shallow = Run(get_recipe("tiny", ["distill.start=student", "decoder.steps=0"]), tmp_path / "again", CPU)
    start_from(shallow, tmp_path / "bundle")
    pairs.run(shallow)
    with pytest.raises(RecipeError, match=r"distill\.layers must be at least the 3"):
        distill.run(shallow)
    monkeypatch.setattr(training_run, "load_bundle", lambda *_: bundle)
    recipe = get_recipe("tiny", ["begin_from=deeper", "distill.start=transplant", "decoder.steps=0"])
    carried = Run(recipe, shallow.out, CPU)
    with pytest.raises(RecipeError, match="other blocks than its teacher"):
        distill.run(carried)
    wide = bundle.manifest.model_copy(update={"vq": replace(recipe.tokenizer_model, channels=64)})
    monkeypatch.setattr(training_run, "load_bundle", lambda *_: replace(bundle, manifest=wide))
    with pytest.raises(RecipeError, match=r"another tokenizer .* tokenizer_model\.channels"):
        distill.run(carried)


def _refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Exit status of `dd-train` with these arguments."""
    monkeypatch.setattr("sys.argv", ["dd-train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_commands_explain_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = CliRunner().invoke(app, ["--help"]).output
    for stage in (
        "tokenizer",
        "decoder",
        "teacher",
        "pairs",
        "own-pairs",
        "distill",
        "evaluate",
        "all",
        "start",
        "export",
    ):
        assert stage in listed
    where = ("--out", str(tmp_path / "x"), "--device", "cpu")
    assert _refused(monkeypatch, "pairs", "--recipe", "tiny", *where) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "run `dd-train tokenizer --recipe tiny --out" in said and "Traceback" not in said
    misfit = ("--set", "begin_from=cifar10", "--set", "distill.start=transplant")
    assert _refused(monkeypatch, "all", "--recipe", "tiny", *misfit, *where) == 2
    assert "cifar10 has another tokenizer than the recipe 'tiny'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x" / "tokenizer.pt").exists(), "before the stages that it would have waited for"
    assert _refused(monkeypatch, "teacher", "--recipe", "huge", *where) == 2
    assert "tiny, cpu, gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "overrides", "says"),
    [
        ("distill", ["tokenizer_model.code_dim=8", "model.code_dim=8"], "code_dim was 4 and is 8"),
        ("distill", ["model.layers=3"], "layers was 2 and is 3"),
        ("evaluate", ["distill.layers=3"], "layers was 2 and is 3"),
        ("distill", ["pairs.guidance=9"], "pairs.guidance was 2.0 and is 9.0"),
        ("pairs", ["pairs.solver=euler"], 'pairs.solver was "dpmpp-3m" and is "euler"'),
        ("decoder", ["train_images=8"], "train_images was 256 and is 8"),
        ("teacher", ["teacher.lr=0.5"], "teacher.lr was 0.001 and is 0.5"),
    ],
)
def test_a_run_folder_of_other_settings_is_refused_in_one_line_that_names_the_field(
    run: Run,
    cache: Path,
    command: str,
    overrides: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
    given = [part for override in overrides for part in ("--set", override)]
    where = ("--recipe", "tiny", "--out", str(run.out), "--device", "cpu")
    assert _refused(monkeypatch, command, *where, *given) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and "Traceback" not in said


def test_weights_that_do_not_say_their_settings_are_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    """Of a run of before, or put there by hand."""
    save_file(load_file(run.out / "teacher.safetensors"), str(tmp_path / "teacher.safetensors"))
    other, tokenizer = Run(get_recipe("tiny", ["model.layers=3"]), tmp_path, CPU), load_tokenizer(run)
    with pytest.raises(RecipeError, match=r"teacher\.safetensors .* is not of the recipe 'tiny'") as caught:
        load_teacher(other, tokenizer)
    assert "\n" not in caught.value.message
    load_teacher(Run(get_recipe("tiny"), tmp_path, CPU), tokenizer)


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["all", "--set", 'evaluate.plans=["dd1"]'], {}, "choose from dd-1, dd-2"),
        (["all", "--stop-after", "-1"], {}, "--stop-after"),
        (["all", "--threads", "-1"], {}, "--threads"),
        (
            ["all"],
            {"WORLD_SIZE": "2"},
            "start several processes with torchrun, which sets RANK=, WORLD_SIZE=2",
        ),
        (["export", "--to", "x", "--name", "My model"], {}, "--name"),
        (["all", "--out", "/dev/null/run"], {}, "/dev/null/run"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    arguments: list[str],
    variables: dict[str, str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command, *more = arguments
    out = tmp_path / "run"
    assert _refused(monkeypatch, command, "--recipe", "tiny", "--out", str(out), *more)
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert not out.exists()
