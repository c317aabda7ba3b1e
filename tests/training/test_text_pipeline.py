"""The whole text pipeline, from packages to a bundle that draws prompts: tiny, and without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from dd_core.bundle import file_entry, load_bundle
from dd_core.errors import HashMismatchError, InvalidRequestError, ManifestError, RecipeError, WeightsError
from dd_core.manifest import read_manifest, write_manifest
from dd_core.plan import plan_for_budget
from dd_core.sampling import sample_images
from dd_core.text.minilm import unpacked
from tests.dd_core.small_text import TEXT, small_text
from tests.training.fakes import Mean
from tests.training.runs import finished_run
from training.cli import app
from training.data import captions, pictograms
from training.data import text as text_data
from training.diagnose.run import diagnose
from training.examples import Example, in_turn
from training.losses.lpips import Lpips, lpips_weights
from training.metrics import caption_retrieval as agreement
from training.metrics import sheet as sheets
from training.recipes.named import get_recipe
from training.run import Run, load_tokenizer
from training.stages import distill, export, pairs
from training.stages.pairs import load_pairs
from training.stages.teacher import new_teacher, teacher_stage
from training.stages.tokens import read_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(corpus: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    return finished_run("text-tiny", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "pictures"
    export.run(run, "pictures", folder)
    return folder


def test_a_run_of_texts_is_diagnosed(run: Run) -> None:
    found = {finding.name: finding for finding in diagnose(run, 20, Mean())}
    assert set(found) == {"codebook", "floor", "condition", "memorisation", "positions", "jumps"}
    assert found["condition"].numbers["share"] <= 1 and "20 fresh ones" in found["memorisation"].says
    assert {"reconstruction", "teacher", "dd-1"} <= set(found["floor"].numbers)


def test_tokens_of_another_corpus_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their labels are places in a list that was another."""
    monkeypatch.setattr(pictograms, "_VERSION", 1)
    with pytest.raises(RecipeError, match=r"tokens\.safetensors was made with other settings: corpus was"):
        read_tokens(run)


def test_a_label_draws_among_its_captions_and_a_prompt_is_itself(run: Run, tmp_path: Path) -> None:
    conditions = text_data.train_conditions(run.recipe, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    drawn = conditions(torch.zeros(64, dtype=torch.long)).states_BTN
    assert 2 <= len({row.numpy().tobytes() for row in drawn}) <= captions.PER_PICTURE
    prompts = text_data.prompt_conditions(run.recipe, ["red cat", "blue dog"], tmp_path / "b.safetensors")
    module, _ = text_data.encoder(TEXT)
    again = text_data.prompt_conditions(run.recipe, ["red cat", "blue dog"], tmp_path / "b.safetensors")
    assert torch.equal(prompts(torch.tensor([1])).states_BTN, again(torch.tensor([1])).states_BTN)
    other = text_data.prompt_conditions(run.recipe, ["red cat", "a dog"], tmp_path / "b.safetensors")
    assert not torch.equal(other(torch.tensor([1])).states_BTN, again(torch.tensor([1])).states_BTN)
    assert module.cfg == TEXT


def test_a_teacher_of_texts_begins_with_what_fits_of_a_teacher_of_classes(run: Run, tmp_path: Path) -> None:
    coder = load_tokenizer(run)
    classes = new_teacher(get_recipe("tiny"), coder, CPU)
    conditions = text_data.prompt_conditions(run.recipe, ["red cat"], tmp_path / "p.safetensors")
    tokens, labels = torch.zeros(1, 8, 64, dtype=torch.int16), torch.zeros(8, dtype=torch.long)
    stage, _ = teacher_stage(run.recipe, tokens, labels, coder, CPU, conditions, classes)
    found, theirs = stage.parts["model"].state_dict(), classes.state_dict()
    assert set(found) - set(theirs) == {
        f"cls_embedding.{k}" for k in ("cap_proj.fc1.weight", "cap_proj.fc2.weight", "uncond_embedding")
    }
    assert all(torch.equal(found[k], v) for k, v in theirs.items() if k in found)


def test_pairs_of_prompts_resume_exactly_and_keep_their_prompts(run: Run, tmp_path: Path) -> None:
    """Killed after a shard and resumed = made in one go; other prompts are refused, not mixed in."""
    file = tmp_path / "prompts.txt"
    file.write_text("red cat\n\n  blue heart \na dog\n")
    runs = [Run(run.recipe, tmp_path / n, CPU, stop) for n, stop in (("whole", None), ("killed", 1))]
    for one in runs:
        for name in ("tokenizer", "teacher"):
            one.out.mkdir(exist_ok=True)
            shutil.copy(run.out / f"{name}.safetensors", one.out)
        pairs.run(one, file)
    with pytest.raises(RecipeError, match="no complete set"):
        load_pairs(runs[1].out / "pairs")
    pairs.run(Run(run.recipe, runs[1].out, CPU))
    whole, killed = (load_pairs(one.out / "pairs") for one in runs)
    assert torch.equal(whole.tokens, killed.tokens) and torch.equal(whole.labels, killed.labels)
    assert whole.labels.tolist() == [i % 3 for i in range(48)]
    assert pairs.pair_prompts(runs[0]) == ["red cat", "blue heart", "a dog"]
    file.write_text("something else\n")
    with pytest.raises(RecipeError, match="other prompts"):
        pairs.run(runs[0], file)
    file.write_text("\n \n")
    with pytest.raises(RecipeError, match="no prompt"):
        captions.read_prompts(file)
    classes = Run(get_recipe("tiny"), run.out, CPU)
    with pytest.raises(RecipeError, match="classes"):
        pairs.run(classes, file)


def test_the_table_says_how_often_the_caption_is_found(run: Run) -> None:
    record = json.loads((run.out / "evaluation" / "evaluation.json").read_text())
    rows = {r["name"]: r for r in record["rows"]}
    assert {"dd-1", "dd-2", "pre-trained-1-21", "teacher", "reconstruction", "real-test"} <= set(rows)
    for name in ("dd-1", "teacher", "reconstruction"):
        assert 0 <= rows[name]["right_caption"] <= 1 and rows[name]["class_accuracy"] is None
    assert rows["real-test"]["right_caption"] is None
    table = (run.out / "evaluation" / "evaluation.md").read_text()
    among = record["settings"]["candidates"]
    assert 2 <= among <= 10, "no more prompts than pictures"
    assert f"right caption of {among}" in table and f"a blind guess reaches {1 / among:.3f}" in table
    assert "classifier" not in table


def test_the_bundle_draws_prompts_the_same_alone_and_together(folder: Path) -> None:
    bundle = load_bundle(folder, CPU)
    assert bundle.text is not None and (bundle.text.length, bundle.text.dim) == (8, 32)
    assert set(bundle.manifest.files) == {
        "tokenizer.safetensors", "student.safetensors", "teacher.safetensors", "text.safetensors",
        "tokenizer.json",
    }  # fmt: skip
    cond = bundle.text.encode(["red heart", "a cat and a dog", "blue dog"])
    for budget in (1, 2, 64):
        plan = plan_for_budget(bundle.presets, budget).plan
        together = sample_images(bundle.sampler, plan, cond, [(5, i) for i in range(3)])
        alone = sample_images(bundle.sampler, plan, cond.select(slice(1, 2)), [(5, 1)])
        assert torch.equal(together[1], alone[0])
    with pytest.raises(InvalidRequestError, match="text states"):
        sample_images(bundle.sampler, plan, [3], [(0, 0)])
    with pytest.raises(InvalidRequestError, match="3 conditions for 1 images"):
        sample_images(bundle.sampler, plan, cond, [(0, 0)])


def test_the_bundles_encoder_is_what_the_model_learned_from(folder: Path, run: Run, tmp_path: Path) -> None:
    bundle = load_bundle(folder, CPU)
    assert bundle.text is not None
    trained = text_data.prompt_conditions(run.recipe, ["red heart"], tmp_path / "x.safetensors")
    cond = bundle.text.encode(["red heart"])
    torch.testing.assert_close(cond.states_BTN.half(), trained.states_MTD, rtol=1e-3, atol=1e-3)
    assert torch.equal(cond.mask_BT, trained.mask_MT)


@pytest.mark.parametrize("name", ["text.safetensors", "tokenizer.json"])
def test_a_damaged_encoder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(HashMismatchError, match=name):
        load_bundle(copy, CPU)
    (copy / name).unlink()
    with pytest.raises(WeightsError, match=name):
        load_bundle(copy, CPU)


def test_an_encoder_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    """The manifest's word against the models' and the file's."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())

    def refused(error: type[Exception], match: str, **changes: object) -> None:
        path.write_text(json.dumps({**manifest, "text": {**manifest["text"], **changes}}))
        with pytest.raises(error, match=match):
            load_bundle(copy, CPU)

    refused(ManifestError, "8 of 32", length=9)
    refused(ManifestError, "heads", heads=5)
    refused(ManifestError, "kind", kind="clip")
    refused(ManifestError, "text", surprise=1)
    refused(WeightsError, "layers", layers=1)
    refused(WeightsError, "numbers", layers=3)
    refused(WeightsError, "numbered to", vocabulary=5)
    path.write_text(json.dumps({**manifest, "text": None}))
    assert load_bundle(copy, CPU).text is None


def test_matrices_of_the_encoder_are_stored_as_bytes_and_the_rest_in_half_precision(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "text.safetensors"
    stored = load_file(path)
    assert stored["words.weight"].dtype == torch.int8 and stored["words.scale"].shape == (13, 1)
    for key, value in stored.items():
        assert value.dtype == (torch.int8 if f"{key.removesuffix('.weight')}.scale" in stored and
                               key.endswith(".weight") else torch.float16), key  # fmt: skip
    table, (original, _) = unpacked(stored, "text"), small_text()
    matrices = [k for k, v in original.state_dict().items() if v.ndim == 2]
    assert len(matrices) == 2 + 6 * len(original.layers) and set(table) == set(original.state_dict())
    for key in matrices:
        error = (table[key] - original.state_dict()[key]).abs()
        scale = stored[key.removesuffix(".weight") + ".scale"].float()
        assert bool((error <= 0.51 * scale).all()), key
    for wrong in (
        {"words.weight": stored["words.weight"].half()},
        {"words.weight": stored["words.weight"][:, 0].contiguous()},  # times its scales it would be a matrix
        {"words.weight": stored["words.weight"][0, 0]},
        {"words.scale": stored["words.scale"][:5]},
    ):
        save_file({**stored, **wrong}, path)
        manifest = read_manifest(copy)
        write_manifest(
            copy, manifest.model_copy(update={"files": {**manifest.files, path.name: file_entry(path)}})
        )
        with pytest.raises(WeightsError, match=r"words\.weight"):
            load_bundle(copy, CPU)


def test_a_sheet_is_of_prompts_that_are_given_or_that_nobody_trained_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, arguments = tmp_path / "prompts.txt", ["sheet", str(folder), "--to", str(tmp_path / "sheet.png")]
    words.write_text(f"purple nothing\n{pictograms.load().concepts[0].name}\n")
    given = [*arguments, "--prompts", str(words), "--budgets", "1,1", "--seeds", "3"]
    said = CliRunner().invoke(app, given)
    assert said.exit_code == 0, said.output
    assert "sheet.png: 3 blocks of dd-1\n" in said.output, "a plan that two budgets choose is drawn once"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * (2 * 33 + 1), 2 * (3 * 33 + 1 + 2 * 4))
    monkeypatch.setattr(sheets, "UNSEEN", ("purple nothing", pictograms.load().concepts[0].name))
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code != 0 and isinstance(refused.exception, RecipeError)
    assert "captions of the corpus: red heart 0" in str(refused.exception)


def test_the_judge_of_captions_learns_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lpips, seen = Lpips(lpips_weights()), []

    def features(images: Tensor, lpips: Lpips) -> Tensor:
        seen.append(len(images))
        return agreement.picture_features(images, lpips)

    monkeypatch.setattr(text_data, "picture_features", features)
    first, again = (text_data.caption_judge(run.recipe, tmp_path, lpips) for _ in range(2))
    pictures = 2 * len(text_data.pictures("train", run.recipe.train_images))
    assert seen == [pictures], "as they are, and mirrored"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    monkeypatch.setattr(pictograms, "digest", lambda: "another corpus")
    text_data.caption_judge(run.recipe, tmp_path, lpips)
    assert seen == [pictures] * 2


def test_examples_are_names_by_how_well_they_are_drawn(run: Run, tmp_path: Path) -> None:
    arguments = ["examples", "--recipe", "text-tiny", "--out", str(run.out), "--seeds", "2"]
    arguments += ["--names", "20", "--shown", "3", "--least", "0"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    lines = [line for line in said.output.splitlines() if "%  " in line]
    assert len(lines) == 3
    names = json.loads((run.out / "examples.json").read_text())["names"]
    known = {captions.called(c): c.group for c in pictograms.load().concepts}
    assert len(set(names)) == 20 and set(names) <= set(known)
    assert {known[n] for n in names[:2]} == {0, 1}, "groups take turns"
    manifest = export.run(run, "pictures", tmp_path / "bundle")
    assert manifest.examples == names[:16] and "chosen by measurement" in manifest.description
    distill.run(run)  # a finished stage, which writes the same student again
    assert export.run(run, "pictures", tmp_path / "repeated").examples == names[:16]
    assert list(export.run_teacher(run, "teacher", tmp_path / "teacher").examples) != names[:16]
    of_another = json.loads((run.out / "examples.json").read_text()) | {"weights": {}}
    (run.out / "examples.json").write_text(json.dumps(of_another))
    manifest = export.run(run, "pictures", tmp_path / "again")
    assert manifest.examples != names[:16], "they were another student's"
    none = CliRunner().invoke(app, [*arguments[:-1], "1.0", "--seeds", "1"])
    few = json.loads((run.out / "examples.json").read_text())["names"]
    assert none.exit_code == 0 and len(few) < 9
    (run.out / "examples.json").unlink()
    refused = CliRunner().invoke(app, ["examples", "--recipe", "tiny", "--out", str(tmp_path / "other")])
    assert isinstance(refused.exception, RecipeError) and "no names to choose" in str(refused.exception)


def test_the_best_of_every_group_comes_first() -> None:
    faces = [Example("grin", 0, 1.0, 0.1), Example("frown", 0, 0.5, 0.3), Example("wink", 0, 1.0, 0.2)]
    found = in_turn([Example("car", 5, 0.75, 0.9), *faces, Example("cat", 3, 0.0, -0.1)])
    assert [e.name for e in found] == ["wink", "car", "cat", "grin", "frown"]


def test_a_margin_above_zero_is_a_right_caption() -> None:
    class Judge:
        def __call__(self, features: torch.Tensor) -> torch.Tensor:
            return features

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "picture_features", lambda images, _: images)
        sentences = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), dim=1)
        found = agreement.Agreement(Judge(), None, sentences, ["a", "b", "c"])  # type: ignore[arg-type]
        pictures, labels = (
            torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0, 0, 1.0]]),
            torch.tensor([0, 1, 2]),
        )
        assert found.margins(pictures, labels).tolist() == pytest.approx([0.4, -0.4, 1.0])
        assert (found.margins(pictures, labels) > 0).tolist() == (
            found.closest(pictures, labels) == labels
        ).tolist()
