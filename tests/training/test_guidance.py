"""`dd-train guidance`: the teacher alone at several scales."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dd_core import plan
from dd_core.errors import RecipeError
from dd_core.sampling import sample_images
from tests.training.fakes import Mean
from training.guidance import Scale, scales_of, sweep
from training.recipes.named import get_recipe
from training.run import (
    Run,
    load_teacher,
    load_tokenizer,
    measuring_seed,
    sampler_without_marginals,
    save,
)
from training.stages.teacher import new_teacher
from training.stages.tokenizer import new_tokenizer

CPU = torch.device("cpu")
IMAGES, SEED = 22, measuring_seed(get_recipe("tiny"), "choice")


@pytest.fixture(autouse=True)
def _surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a tokenizer and a teacher that hears its class."""
    recipe = get_recipe("var-tiny", ["evaluate.reference=40", "evaluate.test=24", "evaluate.batch=4"])
    run = Run(recipe, tmp_path / "run", CPU)
    run.out.mkdir()
    tokenizer = new_tokenizer(recipe, CPU)
    teacher = new_teacher(recipe, tokenizer, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    save(run, "tokenizer", tokenizer)
    save(run, "teacher", teacher)
    return run


def drawn(run: Run, scale: Scale) -> torch.Tensor:
    """The images on disk of a scale."""
    return load_file(run.out / "guidance" / scale.name / "samples" / "teacher.safetensors")["images"]


def test_each_scale_has_a_row_of_the_teachers_pictures_at_it(run: Run) -> None:
    none, also_none, strong = scales = scales_of("1", "0,8")
    rows = sweep(run, scales, IMAGES, Mean())
    assert [(row.name, row.images) for row in rows] == [
        ("constant-1", IMAGES),
        ("linear-0", IMAGES),
        ("linear-8", IMAGES),
    ]
    assert all(row.class_accuracy is not None for row in rows)
    assert rows[0].fid == rows[1].fid != rows[2].fid
    assert torch.equal(drawn(run, none), drawn(run, also_none)), "two names for no guidance"
    assert not torch.equal(drawn(run, none), drawn(run, strong))

    tokenizer = load_tokenizer(run)
    sampler = sampler_without_marginals(run, tokenizer, None, load_teacher(run, tokenizer))
    sampler = replace(sampler, draw=strong.of(sampler.draw), exact=False)
    teacher = plan.teacher(run.recipe.model.layout.num_blocks, draw="flow")
    same = sample_images(sampler, teacher, [0, 1, 2, 3], [(SEED, i) for i in range(4)])
    assert torch.equal(drawn(run, strong)[:4], same)


def test_it_leaves_a_table_and_a_picture(run: Run) -> None:
    rows = sweep(run, scales_of("1.5", "2"), IMAGES, Mean())
    out = run.out / "guidance"
    lines = (out / "guidance.md").read_text().splitlines()
    assert lines[0].endswith("| right class |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| constant 1.5", "| linear 2"]
    record = json.loads((out / "guidance.json").read_text())
    assert [row["fid"] for row in record["rows"]] == [row.fid for row in rows]
    with Image.open(out / "guidance.png") as picture:
        assert picture.width > 4 * picture.height, "ten pictures beside each other, a row for each scale"


def test_a_scale_that_was_measured_is_not_measured_again(run: Run) -> None:
    [first] = sweep(run, scales_of("1", ""), IMAGES, Mean())
    again = Mean()
    assert sweep(run, scales_of("1,3", ""), IMAGES, again)[0] == first
    assert again.seen == IMAGES, "of the new scale alone"
    other = load_teacher(run, load_tokenizer(run))
    with torch.no_grad():
        other.head.weight *= -1
    save(run, "teacher", other)
    assert sweep(run, scales_of("1", ""), IMAGES, Mean()) != [first], "another teacher, another row"


def test_pictures_are_by_the_decoder_once_there_is_one(run: Run) -> None:
    assert run.recipe.decoder.steps, "a recipe whose decoder comes after the pairs"
    [scale] = scales = scales_of("", "2")
    sweep(run, scales, IMAGES, Mean())
    before, tokenizer = drawn(run, scale), load_tokenizer(run)
    with torch.no_grad():
        for weight in tokenizer.decoder.parameters():
            weight.add_(0.1)
    save(run, "decoder", tokenizer)
    sweep(run, scales, IMAGES, Mean())
    assert not torch.equal(drawn(run, scale), before)


@pytest.mark.parametrize(
    ("constant", "linear", "said"),
    [
        ("1,x", "", "--constant takes different numbers of 0..1000 with commas between, as 1,2.5, not '1,x'"),
        ("", "2,2.0", "--linear takes different numbers .* not '2,2.0'"),
        ("-1", "", "--constant takes .* not '-1'"),
        ("nan", "", "--constant takes .* not 'nan'"),
        ("", "inf", "--linear takes .* not 'inf'"),
        ("", " ,", "name some scales, as --constant 1,2 or --linear 2,4"),
    ],
)
def test_other_scales_are_refused(constant: str, linear: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        scales_of(constant, linear)


def test_a_run_without_a_teacher_or_images_is_refused(run: Run) -> None:
    (run.out / "teacher.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"teacher.safetensors is not there yet: run `dd-train teacher"):
        sweep(run, scales_of("1", ""), IMAGES, Mean())
    with pytest.raises(RecipeError, match="has no images to measure against"):
        sweep(replace(run, recipe=get_recipe("var-dd-d16")), scales_of("1", ""), IMAGES, Mean())
