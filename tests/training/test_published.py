"""A published teacher of classes, from its checkpoint to a measured bundle, at tiny size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from dd_core.bundle import load_bundle
from dd_core.condition import ClassCondition
from dd_core.errors import RecipeError
from dd_core.hub.convert import convert
from dd_core.hub.pull import LocalFile
from dd_core.hub.registry import find_spec
from dd_core.hub.storage import models_folder
from dd_core.models.build import new_student, new_teacher, new_tokenizer
from dd_core.models.config import MultiScaleConfig, VARConfig
from dd_core.sampling import sample_images
from tests.hub import content_of, random_modules, saved, tiny_spec
from tests.tiny import tiny_bundle
from tests.training.fakes import Mean
from tests.training.helpers import pictures_like
from tests.training.test_stages import RandomLpips
from training.measure import Request, Subject, measure, reference_folder
from training.recipes.costs import costs
from training.recipes.named import get_recipe
from training.recipes.settings import PairsRecipe
from training.run import Run
from training.stages import distill, evaluate, export, pairs
from training.stages.pairs import load_pairs, make_pairs
from training.start import start_from

CPU = torch.device("cpu")
STUDENTS = {"var-dd-d16": "var-d16", "llamagen-dd-b": "llamagen-b-256"}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_published_teacher_becomes_a_measured_bundle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RandomLpips(tmp_path)
    monkeypatch.setenv("DD_LPIPS", str(tmp_path / "lpips.safetensors"))
    monkeypatch.setenv("DD_CACHE", str(tmp_path / "cache"))
    spec = tiny_spec(STUDENTS[name])
    if isinstance(spec.vq, MultiScaleConfig) and isinstance(spec.teacher, VARConfig):
        sides = (1, 2, 4, 8)  # 16 pixels: of smaller pictures LPIPS has no maps
        vq, teacher = replace(spec.vq, sides=sides), replace(spec.teacher, sides=sides)
        spec = replace(spec, image_size=16, vq=vq, teacher=teacher)
    files = {}
    for part, module in random_modules(spec).items():
        path = tmp_path / f"{part}.pth"
        path.write_bytes(saved(content_of(spec, part, module)))
        files[part] = LocalFile.by_hand(part, path)
    monkeypatch.setenv("DD_HOME", str(tmp_path / "home"))
    convert(spec, files, models_folder() / spec.name)
    whole, tiny = get_recipe(name), get_recipe("tiny")
    assert spec.teacher is not None
    second = spec.teacher.layout.num_blocks // 2
    recipe = replace(
        whole,
        tokenizer_model=spec.vq,
        model=spec.teacher,
        pairs=replace(whole.pairs, count=24, batch=8, shard=16),
        distill=replace(tiny.distill, train_steps=(0, second), split=second),
        log_every=2,
        save_every=2,
        preview_every=6,
    )
    run = Run(recipe, tmp_path / "run", CPU)
    start_from(run, spec.name)
    pairs.run(run)
    assert load_pairs(run.out / "pairs").labels.tolist() == [i % 10 for i in range(24)]
    distill.run(run)
    with pytest.raises(RecipeError, match="--reference"):
        evaluate.run(run)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(pictures_like(12)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{i}.png")
    request = Request(tmp_path / "real", images=10, plans=("dd-1", "dd-2", "onestep"), timing=False)
    rows = measure(Subject.of_run(run), request, Mean(), reference_folder(run))
    assert [row.name for row in rows] == ["dd-1", "dd-2", "onestep"]
    manifest = export.run(run, "mine", tmp_path / "bundle")
    assert {p.name: p.metrics["fid"] for p in manifest.presets} == {row.name: row.fid for row in rows}
    assert manifest.classes == list(spec.classes) and manifest.licence == spec.licence
    assert (manifest.draw.guidance, manifest.draw.guidance_schedule) == (
        2.0,
        "linear" if spec.family == "var" else "constant",
    )
    bundle = load_bundle(tmp_path / "bundle", CPU)
    picture = sample_images(bundle.sampler, bundle.presets[1].plan, [4], [(0, 0)])
    assert picture.shape == (1, spec.image_size, spec.image_size, 3)


@pytest.mark.parametrize(
    ("name", "teacher", "steps", "train_steps", "lr"),
    [
        ("var-dd-d16", "var-d16", 281_250, (0, 5), 2e-4),
        ("var-dd-d20", "var-d20", 281_250, (0, 4), 2e-4),
        ("var-dd-d24", "var-d24", 281_250, (0, 4), 2e-4),
        ("llamagen-dd-b", "llamagen-b-256", 164_062, (0, 80), 1e-4),
        ("llamagen-dd-l", "llamagen-l-256", 164_062, (0, 80), 1e-4),
    ],
)
def test_the_recipes_have_the_papers_numbers(
    name: str, teacher: str, steps: int, train_steps: tuple[int, ...], lr: float
) -> None:
    recipe, spec, student = get_recipe(name), find_spec(teacher), find_spec(name)
    assert (recipe.tokenizer_model, recipe.model) == (spec.vq, spec.teacher)
    assert (recipe.pairs.count, recipe.pairs.guidance) == (1_200_000, 2.0)
    distill = recipe.distill
    assert (distill.steps, distill.batch, distill.train_steps) == (steps, 512, train_steps)
    assert distill.lr == pytest.approx(lr)
    assert (distill.lpips, distill.cross_entropy, distill.mse, distill.ema) == (1.0, 0.1, 0.0, 0.9999)
    [two] = [p.preset().plan for p in student.presets if p.name == "dd-2"]
    assert (two.segments[1].start, two.split) == (train_steps[1], distill.split)


def test_pairs_from_before_the_schedule_was_a_setting_stay_good(tmp_path: Path) -> None:
    """A constant schedule is not written."""
    sampler = load_bundle(tiny_bundle(tmp_path / "bundle"), CPU).sampler
    cfg = PairsRecipe(count=4, batch=4, shard=4)
    make_pairs(sampler, cfg, 10, tmp_path / "pairs", seed=1, identity="a")
    assert "guidance_schedule" not in (tmp_path / "pairs" / "manifest.json").read_text()
    assert len(load_pairs(tmp_path / "pairs", cfg).tokens) == 4
    with pytest.raises(RecipeError, match="guidance_schedule was"):
        load_pairs(tmp_path / "pairs", replace(cfg, guidance_schedule="linear"))


def test_costs_of_any_depth_follow_from_those_of_one_and_two_blocks() -> None:
    tiny = get_recipe("var-tiny", ["distill.batch=4"])
    deep = replace(tiny, model=tiny.model.with_layers(3))
    teacher = new_teacher(deep.model, new_tokenizer(deep.tokenizer_model)).eval()
    tokens = torch.zeros(1, deep.model.layout.num_tokens, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        teacher(tokens, ClassCondition(torch.zeros(1, dtype=torch.long)))
    flow = tokens.numel() * 10 * 2 * 2 * 64 * 4  # ten evaluations, two products with 64 codes of 4
    found = costs(deep)
    assert found.pairs == 48 * (2 * counter.get_total_flops() + flow)
    weights = sum(p.numel() for p in new_student(deep.model).parameters())
    tokenizer = sum(p.numel() for p in new_tokenizer(deep.tokenizer_model).parameters())
    assert found.state == 4 * (6 * weights + tokenizer)
    assert costs(replace(deep, distill=replace(deep.distill, batch=8))).distill == 2 * found.distill
