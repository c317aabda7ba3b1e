"""The whole pipeline in next-scale order, at tiny size: from images to a bundle, and on from there."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dd_core.bundle import load_bundle
from dd_core.codebook import lookup
from dd_core.condition import ClassCondition
from dd_core.models.config import VARConfig
from dd_core.sampling import renoise, sample_images
from tests.training.fakes import Mean
from tests.training.runs import finished_run
from training.metrics import plots
from training.optim.loop import Batches
from training.recipes.named import get_recipe
from training.run import Run, load_teacher, load_tokenizer
from training.stages import distill, evaluate, export, pairs
from training.stages.pairs import load_pairs, noise_of
from training.start import start_from

CPU = torch.device("cpu")
TOKENS = 1 + 4 + 16 + 64


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DD_CACHE", str(cache))
        patch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
        patch.setattr(plots, "loss_curve", lambda *_: None)  # test_pipeline.py draws one
        return finished_run("var-tiny", tmp_path_factory.mktemp("run"))


def test_a_pair_has_the_tokens_of_all_scales(run: Run) -> None:
    pairs = load_pairs(run.out / "pairs")
    assert pairs.tokens.shape == (48, TOKENS)
    assert len(pairs.tokens.unique()) > 8


def test_plans_are_counted_in_scales(run: Run) -> None:
    report = json.loads((run.out / "evaluation" / "evaluation.json").read_text())
    passes = {row["name"]: row["passes"] for row in report["rows"]}
    assert passes["dd-1"] == 1 and passes["dd-2"] == 2 and passes["teacher"] == 4
    assert passes["skip-1"] == 3 and passes["onestep"] == 1
    assert {name for name in passes if name.startswith("pre-trained-")} == {
        "pre-trained-1-3",
        "pre-trained-2-3",
    }


def test_the_bundle_serves_what_was_trained(run: Run, tmp_path: Path) -> None:
    manifest = export.run(run, "var", tmp_path / "bundle")
    assert manifest.family == "var" and manifest.image_size == 32
    bundle = load_bundle(tmp_path / "bundle", CPU)
    [two] = [preset.plan for preset in bundle.presets if preset.plan.name == "dd-2"]
    assert two.split == 2
    for preset in bundle.presets:
        picture = sample_images(bundle.sampler, preset.plan, [0, 9], [(0, 0), (0, 1)])
        assert picture.shape == (2, 32, 32, 3)


def test_a_run_can_start_from_a_bundle_of_this_family(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a student of more blocks than its teacher, whose pictures are the same before it is trained."""
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
    export.run(run, "var", tmp_path / "bundle")
    overrides = ["decoder.steps=0", "distill.start=student", "distill.layers=3", "distill.lr=1e-12"]
    again = Run(get_recipe("var-tiny", overrides), tmp_path / "again", CPU)
    again.out.mkdir()
    start_from(again, tmp_path / "bundle")
    assert load_file(again.out / "tokens.safetensors")["tokens"].shape == (2, 256, TOKENS)
    pairs.run(again)
    distill.run(again)
    evaluate.run(again, extractor=Mean(), timing=False)
    manifest = export.run(again, "deeper", tmp_path / "deeper")
    assert isinstance(manifest.student, VARConfig) and manifest.student.depth == 3
    first, deeper = (load_bundle(tmp_path / name, CPU) for name in ("bundle", "deeper"))
    plan = first.presets[0].plan
    was, now = (sample_images(b.sampler, plan, [3], [(1, 0)]) for b in (first, deeper))
    assert (was.int() - now.int()).abs().max() <= 2


@pytest.mark.parametrize("evenness", [0.0, 0.5, 1.0])
def test_scales_count_by_their_tokens_or_alike(run: Run, evenness: float) -> None:
    """Cross entropy of an update: a mean over tokens, whose weight falls with the size of their scale."""
    settings = replace(run.recipe.distill, evenness=evenness, lpips=0.0, train_steps=(0, 2), batch=48)
    recipe = replace(run.recipe, distill=settings)
    tokenizer, pairs = load_tokenizer(run), load_pairs(run.out / "pairs")
    parts = pairs, load_teacher(run, tokenizer), tokenizer, None, CPU
    torch.manual_seed(5)
    stage, _, student = distill.distill_stage(recipe, *parts)
    with torch.no_grad():  # as it begins, all of its logits are all but equal
        student.head.weight.mul_(100)  # type: ignore[operator,union-attr]
    begun = copy.deepcopy(student)
    torch.manual_seed(5)
    found = stage.update(0)["cross_entropy"]
    torch.manual_seed(5)
    chosen = Batches(48, 48, recipe.seed).at(0)
    steps = torch.tensor([0, 2])[torch.randint(2, (48,))]
    total = weights = 0.0
    with torch.no_grad():
        for i, t in zip(chosen.tolist(), steps.tolist(), strict=True):
            target, label = pairs.tokens[i : i + 1].long(), ClassCondition(pairs.labels[i : i + 1])
            noise = noise_of([pairs], torch.tensor([i]), 4).float()
            step = torch.tensor([t])
            x = renoise(lookup(tokenizer.codebook_VC, target), noise, step, begun.block_L)
            ce = F.cross_entropy(begun(x, label, step)[1][0], target[0], reduction="none")
            for block, side in enumerate((1, 2, 4, 8)):
                if block >= t:
                    start = sum(s * s for s in (1, 2, 4, 8)[:block])
                    weight = (side * side) ** -evenness
                    total += weight * ce[start : start + side * side].sum().item()
                    weights += weight * side * side
    assert float(found) == pytest.approx(total / weights, rel=5e-3)  # the update's logits may be bfloat16
