"""`dd-train ablate`, and what it is made of: exports and FIDs of a student while it is distilled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from safetensors.torch import load_file

from dd_core.errors import RecipeError
from dd_core.models.build import new_student
from dd_core.sampling import Sampler, sample_images
from tests.training.fakes import Mean
from training.ablation import Ablation
from training.cli import main
from training.data.cifar10 import cifar10
from training.metrics import chunks, plots
from training.metrics.fid import frechet_distance
from training.metrics.plots import loss_curve
from training.optim.loop import Callback
from training.optim.progress import figures_of, read_journal
from training.recipes.named import get_recipe
from training.recipes.saved import read_recipe
from training.run import Run, load, load_tokenizer, measuring_seed
from training.stages import distill, student_fid

CPU = torch.device("cpu")
SHORT = (
    *("tokenizer.steps=2", "teacher.steps=2", "teacher.lr=0.1", "decoder.steps=0", "distill.lpips=0.0"),
    *("evaluate.images=16", "evaluate.batch=4"),
)
VALUES = {"timesteps": ("--steps", "8,20"), "pairs": ("--counts", "16,48")}


@pytest.fixture(scope="module", autouse=True)
def _surroundings(cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DD_CACHE", str(cache))
        patch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
        patch.setattr(student_fid, "FeatureExtractor", lambda *_: Mean())
        patch.setattr(plots, "loss_curve", lambda *_: None)
        patch.setattr(chunks, "CHUNK", 8)
        yield


def train(out: Path, *words: str) -> int:
    """`dd-train` with these words; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dd-train", *words, "--out", str(out), "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def with_pairs(_surroundings: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has pairs."""
    out = tmp_path_factory.mktemp("run")
    sets = [part for each in SHORT for part in ("--set", each)]
    assert train(out, "tokenizer", "--recipe", "tiny", *sets) == 0
    assert train(out, "teacher") == train(out, "pairs") == 0
    return out


def copy_of(folder: Path, out: Path, *overrides: str) -> Run:
    """A run of its own with the same models and pairs."""
    shutil.copytree(folder, out)
    return Run(get_recipe("tiny", [*SHORT, *overrides]), out, CPU)


def fids(run: Run) -> dict[int, dict[str, float]]:
    """The FIDs of the journal by step, of which each has one line."""
    lines = [json.loads(line) for line in (run.out / "student.jsonl").read_text().splitlines()]
    found = [line for line in lines if "fid_images" in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line["step"]: {k: v for k, v in line.items() if k.startswith("fid-")} for line in found}


def bytes_of(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.out.glob("student*.safetensors")}


@pytest.fixture(scope="module")
def watched(with_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished distillation that was measured after 4 and, at its end, 6 updates; no test changes it."""
    run = copy_of(
        with_pairs, tmp_path_factory.mktemp("watched") / "whole", "keep_every=2", "evaluate_every=4"
    )
    distill.run(run)
    return run


def test_a_callback_is_due_at_its_steps_and_perhaps_at_the_end() -> None:
    def due(every: int, at_end: bool) -> list[int]:
        callback = Callback(every, lambda _: None, at_end)
        return [done for done in range(8) if callback.due(done, 7)]

    assert due(3, False) == [3, 6]
    assert due(3, True) == [3, 6, 7]
    assert due(0, False) == due(0, True) == []


def test_the_figures_are_those_of_the_exports(watched: Run) -> None:
    """Image i has the label i mod 10 and noise that the run's own evaluation does not use."""
    assert set(bytes_of(watched)) == {f"student{k}.safetensors" for k in ("", "-2", "-4", "-6")}
    last = load_file(watched.out / "student.safetensors")
    assert all(torch.equal(v, last[k]) for k, v in load_file(watched.out / "student-6.safetensors").items())
    found, recipe, network = fids(watched), watched.recipe, Mean()
    assert list(found) == [4, 6]
    real = network(cifar10("train").images[: recipe.evaluate.reference])
    for step, figures in found.items():
        student = load(watched, new_student(recipe.student), f"student-{step}", "distill")
        sampler = Sampler(recipe.model.layout, load_tokenizer(watched), student, device=CPU, exact=False)
        for chosen in student_fid.student_plans(recipe):
            keys = [(measuring_seed(recipe, "choice"), i) for i in range(16)]
            images = sample_images(sampler, chosen, [i % 10 for i in range(16)], keys)
            fid = frechet_distance(real, network(images.permute(0, 3, 1, 2)))
            assert figures.pop(f"fid-{chosen.name}") == pytest.approx(fid, rel=1e-4)
        assert not figures


@pytest.mark.parametrize("seen", [0, 24, 40], ids=lambda n: f"killed after {n} of 64 images")
def test_a_killed_measurement_is_neither_lost_nor_made_twice(
    seen: int, watched: Run, with_pairs: Path, tmp_path: Path
) -> None:
    run = copy_of(with_pairs, tmp_path / "killed", "keep_every=2", "evaluate_every=4", "save_every=5")
    with pytest.raises(KeyboardInterrupt):
        distill.run(run, Mean(stop_after=seen))
    again = Mean()
    distill.run(run, again)
    assert again.seen == 64 - seen
    assert fids(run) == fids(watched)
    assert bytes_of(run) == bytes_of(watched)
    once_more = Mean()
    distill.run(run, once_more)
    assert once_more.seen == 0 and fids(run) == fids(watched)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_stopped_run_has_the_figures_of_one_that_was_not(
    stop: int, watched: Run, with_pairs: Path, tmp_path: Path
) -> None:
    run = copy_of(with_pairs, tmp_path / "stopped", "keep_every=2", "evaluate_every=4")
    distill.run(replace(run, stop_after=stop))
    assert not (run.out / "student.safetensors").exists()
    distill.run(run)
    assert fids(run) == fids(watched)
    assert bytes_of(run) == bytes_of(watched)


def test_the_curves_of_a_run_have_its_fid(
    watched: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what else the lines say of it."""
    monkeypatch.setattr(pyplot, "close", lambda _: None)
    loss_curve(figures_of(read_journal(watched.out / "student.jsonl")), tmp_path / "curves.png")
    titles = [axis.get_title() for axis in pyplot.gcf().axes]
    monkeypatch.undo()
    pyplot.close("all")
    assert titles == ["cross_entropy", "mse", "accuracy", "gradient_norm", "fid-dd-1", "fid-dd-2"]


def test_figures_of_another_number_of_images_are_measured_anew(watched: Run, tmp_path: Path) -> None:
    evaluate = replace(watched.recipe.evaluate, images=24)
    out = shutil.copytree(watched.out, tmp_path / "more")
    more = replace(watched, recipe=replace(watched.recipe, evaluate=evaluate), out=out)
    network = Mean()
    distill.run(more, network)
    assert network.seen == 48
    assert [line["step"] for line in student_fid.fid_lines(more)] == [6]
    assert [line["step"] for line in student_fid.fid_lines(watched)] == [4, 6]


def test_a_teacher_leaves_exports_too(with_pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "taught"
    shutil.copytree(with_pairs, out)
    for name in ("teacher.pt", "teacher.safetensors"):
        (out / name).unlink()
    shutil.rmtree(out / "pairs")
    assert train(out, "teacher", "--set", "keep_every=1") == 0
    assert {p.name for p in out.glob("teacher-*.safetensors")} == {
        "teacher-1.safetensors",
        "teacher-2.safetensors",
    }
    first, last = (load_file(out / f"teacher{k}.safetensors") for k in ("-1", ""))
    assert first.keys() == last.keys() and any(not torch.equal(v, last[k]) for k, v in first.items())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["keep_every=-1"], "keep_every must be greater than or equal to 0, not '-1'"),
        (["evaluate_every=often"], "evaluate_every must be a valid integer.*, not 'often'"),
        (
            ["evaluate_every=1", 'evaluate.plans=["teacher"]'],
            "evaluate.plans must have a plan of the student's",
        ),
        (["distill.pairs=49"], "distill.pairs must be at most pairs.count, 48"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        get_recipe("tiny", overrides)


def test_a_run_without_images_cannot_be_watched() -> None:
    with pytest.raises(RecipeError, match="evaluate_every must be 0: the recipe has no images"):
        get_recipe("var-dd-d16", ["evaluate_every=100"])


def test_an_ablation_measures_the_plans_of_the_student_alone() -> None:
    """Of those that the run names: another second step has other hybrids."""
    ablation = Ablation("timesteps", (8,), updates=4, every=2, images=16)
    parent = get_recipe("tiny", ['evaluate.plans=["dd-2", "pre-trained-1-21", "teacher"]'])
    assert ablation.recipe(parent, 8).evaluate.plans == ("dd-2",)
    assert ablation.recipe(get_recipe("tiny"), 8).evaluate.plans == ()
    with pytest.raises(RecipeError, match="the recipe 'var-dd-d16' has no images for an ablation"):
        ablation.check(get_recipe("var-dd-d16"))


def report(run: Path, subject: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"ablation-{subject}" / "ablation.json").read_text())
    assert found["settings"].pop("hours") > 0
    return found


@pytest.mark.parametrize("subject", VALUES)
def test_an_ablation_is_curves_of_runs_that_share_what_they_can(
    subject: str, with_pairs: Path, tmp_path: Path
) -> None:
    """Ended on the way, it is the ablation that was not."""
    words = ("ablate", subject, *VALUES[subject], "--updates", "4", "--every", "2", "--images", "16")
    values = [int(value) for value in VALUES[subject][1].split(",")]
    whole, stopped = (shutil.copytree(with_pairs, tmp_path / name) for name in ("whole", "stopped"))
    assert train(whole, *words) == 0
    assert train(stopped, *words, "--stop-after", "3") == 0
    assert {(p["value"], p["updates"]) for p in report(stopped, subject)["points"]} == {(values[0], 2)}
    assert train(stopped, *words) == 0
    found = report(whole, subject)
    assert report(stopped, subject) == found
    points = found["points"]
    assert [(p["value"], p["plan"], p["updates"], p["passes"]) for p in points] == [
        (value, name, updates, passes) for value in values for name, passes in (("dd-1", 1), ("dd-2", 2))
        for updates in (2, 4)
    ]  # fmt: skip
    pairs = {value: value if subject == "pairs" else 48 for value in values}
    assert [p["epochs"] for p in points] == pytest.approx(
        [p["updates"] * 8 / pairs[p["value"]] for p in points]
    )
    assert len({p["fid"] for p in points if p["plan"] == "dd-2"}) == 4
    assert found["teacher"]["passes"] == 64 and found["settings"]["images"] == 16
    folder = whole / f"ablation-{subject}"
    with Image.open(folder / "ablation.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height
    for value in values:
        names = ("tokenizer.safetensors", "teacher.safetensors", "pairs")
        assert all((folder / str(value) / name).is_symlink() for name in names)
        assert (folder / str(value) / "student-4.safetensors").is_file()


def test_runs_of_an_ablation_differ_in_its_setting_alone(with_pairs: Path, tmp_path: Path) -> None:
    """Each is what a run with this setting would be; the first pairs are those of a smaller set."""
    out = shutil.copytree(with_pairs, tmp_path / "run")
    words = ("--updates", "3", "--every", "3", "--images", "16")
    assert train(out, "ablate", "timesteps", "--steps", "8", *words) == 0
    assert train(out, "ablate", "pairs", "--counts", "16", *words) == 0
    other = copy_of(with_pairs, tmp_path / "other", "distill.train_steps=[0, 8]", "distill.steps=3")
    distill.run(other)
    fewer = copy_of(with_pairs, tmp_path / "fewer", "distill.steps=3")
    manifest = fewer.out / "pairs" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"count": 16}))
    distill.run(fewer)
    for run, folder in ((other, "ablation-timesteps/8"), (fewer, "ablation-pairs/16")):
        wanted = load_file(run.out / "student.safetensors")
        found = load_file(out / folder / "student.safetensors")
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())


def test_a_value_can_be_added_later(with_pairs: Path, tmp_path: Path) -> None:
    out = shutil.copytree(with_pairs, tmp_path / "run")
    words = ("ablate", "timesteps", "--updates", "2", "--every", "2", "--images", "16", "--steps")
    assert train(out, *words, "8") == 0
    before = (out / "ablation-timesteps" / "8" / "student.jsonl").read_bytes()
    assert train(out, *words, "8,40") == 0
    assert (out / "ablation-timesteps" / "8" / "student.jsonl").read_bytes() == before
    assert {p["value"] for p in report(out, "timesteps")["points"]} == {8, 40}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("timesteps",), "ablate timesteps takes --steps, numbers with commas between, and no --counts"),
        (("pairs", "--counts", "16", "--steps", "8"), "ablate pairs takes --counts"),
        (("timesteps", "--steps", "8,x"), "--steps takes numbers with commas between, not '8,x'"),
        (("timesteps", "--steps", "8,64"), "--steps takes different numbers of 1..63, not 8,64"),
        (("timesteps", "--steps", "0"), "--steps takes different numbers of 1..63, not 0"),
        (("pairs", "--counts", "16,16"), "--counts takes different numbers of 1..48, not 16,16"),
        (("pairs", "--counts", "49"), "--counts takes different numbers of 1..48, not 49"),
        (
            ("pairs", "--counts", "16", "--updates", "2", "--every", "3"),
            "--every must be at most --updates, 2",
        ),
    ],
)
def test_values_that_cannot_be_get_one_line(
    words: tuple[str, ...], says: str, with_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(with_pairs.iterdir())
    assert train(with_pairs, "ablate", *words) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if says in line] != []
    assert sorted(with_pairs.iterdir()) == before


def test_an_ablation_needs_pairs_and_keeps_its_settings(
    with_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "empty", "ablate", "timesteps", "--recipe", "tiny", "--steps", "8") == 2
    assert "run `dd-train tokenizer" in capsys.readouterr().err
    out = shutil.copytree(with_pairs, tmp_path / "run")
    words = ("ablate", "timesteps", "--steps", "8", "--updates", "2", "--every", "2", "--images")
    assert train(out, *words, "16") == 0
    assert train(out, *words, "20") == 2
    assert "evaluate.images was 16 and is 20" in capsys.readouterr().err
    saved = read_recipe(out / "ablation-timesteps" / "8")
    assert saved is not None and saved.evaluate.images == 16
