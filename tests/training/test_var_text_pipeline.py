"""The whole pipeline of texts in next-scale order, at tiny size: pictures of 64 pixels for a prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dd_core.bundle import load_bundle
from dd_core.condition import TextCondition
from dd_core.models.config import VARConfig
from dd_core.sampling import sample_images
from tests.training.fakes import Mean
from tests.training.helpers import pictures_like
from tests.training.runs import finished_run
from training.diagnose.run import diagnose
from training.guidance import scales_of, sweep
from training.measure import Request, Subject, measure
from training.recipes.named import get_recipe
from training.run import Run, load_teacher, load_tokenizer
from training.stages import export
from training.stages.pairs import load_pairs
from training.stages.teacher import new_teacher
from training.start import start_from

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(corpus: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    return finished_run("text-var-tiny", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "pictures"
    export.run(run, "pictures", folder)
    return folder


def test_a_pair_has_a_prompt_and_the_tokens_of_all_scales(run: Run) -> None:
    pairs = load_pairs(run.out / "pairs")
    assert pairs.tokens.shape == (48, 1 + 4 + 16 + 64) and len(pairs.labels.unique()) > 8


def test_training_moves_the_layers_that_read_the_text(run: Run) -> None:
    tokenizer = load_tokenizer(run)
    trained, begun = load_teacher(run, tokenizer), new_teacher(run.recipe, tokenizer, CPU)
    moved = [
        name
        for (name, a), b in zip(trained.state_dict().items(), begun.state_dict().values(), strict=True)
        if not torch.equal(a, b)
    ]
    assert {"class_emb.cap_proj.fc1.weight", "class_emb.cap_proj.fc2.bias"} <= set(moved)
    assert "class_emb.uncond_embedding" not in moved, "what stands for no text is drawn once"


def test_the_bundle_draws_prompts_at_64_pixels(folder: Path) -> None:
    bundle = load_bundle(folder, CPU)
    assert bundle.manifest.family == "var" and bundle.manifest.image_size == 64
    assert isinstance(bundle.manifest.model, VARConfig) and bundle.text is not None
    prompts = bundle.text.encode(["red heart", "blue cat", "gold star"])
    pictures = [sample_images(bundle.sampler, p.plan, prompts, [(0, 0)] * 3) for p in bundle.presets]
    assert {tuple(drawn.shape) for drawn in pictures} == {(3, 64, 64, 3)}
    assert any(not torch.equal(drawn[0], drawn[1]) for drawn in pictures), "one noise, two prompts"


def test_a_run_is_measured_against_pictures_with_captions(run: Run, folder: Path, tmp_path: Path) -> None:
    """By the encoder that its bundle has."""
    for i, image in enumerate(pictures_like(12)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("red heart\n" if i % 2 else "blue cat\n")
    subject = Subject.of_run(run)
    request = Request(tmp_path, images=12, plans=("dd-1",), batch=5, samples=False, timing=False)
    [row] = measure(subject, request, Mean(), tmp_path / "out")
    assert (row.name, row.images) == ("dd-1", 12)
    encoder = load_bundle(folder, CPU).text
    assert subject.encode is not None and encoder is not None
    ours, theirs = (encode(["red heart", "blue cat"]) for encode in (subject.encode, encoder.encode))
    assert isinstance(ours, TextCondition)
    assert torch.equal(ours.mask_BT, theirs.mask_BT)
    torch.testing.assert_close(ours.states_BTN, theirs.states_BTN, atol=2e-3, rtol=0)


def test_a_bundle_names_what_training_began_with_and_not_its_place(run: Run, tmp_path: Path) -> None:
    begun = replace(run, recipe=replace(run.recipe, begin_from=str(tmp_path / "mine")))
    manifest = export.run_teacher(begun, "pictures", tmp_path / "bundle")
    assert "the weights of mine." in manifest.data
    assert str(tmp_path) not in manifest.model_dump_json()


def test_scales_of_guidance_are_judged_by_captions(run: Run) -> None:
    [row] = sweep(run, scales_of("", "2"), 12, Mean())
    assert row.name == "linear-2" and row.right_caption is not None and row.class_accuracy is None
    text = (run.out / "guidance" / "guidance.md").read_text()
    among = json.loads((run.out / "evaluation" / "evaluation.json").read_text())["settings"]["candidates"]
    assert among < 100 and text.splitlines()[0].endswith(f"| right caption of {among} |")


def test_a_run_starts_from_it_and_is_diagnosed(run: Run, folder: Path, tmp_path: Path) -> None:
    again = Run(get_recipe("text-var-tiny", ["decoder.steps=0"]), tmp_path / "again", CPU)
    again.out.mkdir()
    start_from(again, folder)
    assert {f.name for f in diagnose(run, 20, Mean())} >= {"floor", "condition", "jumps"}
