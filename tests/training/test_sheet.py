"""A sheet of a model of classes; `test_text_pipeline` has that of texts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dd_core.bundle import load_bundle
from dd_core.errors import RecipeError
from dd_core.manifest import read_manifest, write_manifest
from dd_core.plan import plan_for_budget
from dd_core.sampling import sample_images
from tests.tiny import tiny_bundle
from training.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def test_each_block_is_a_seed_and_each_row_a_budget(folder: Path, tmp_path: Path) -> None:
    bundle, words = load_bundle(folder, torch.device("cpu")), tmp_path / "classes.txt"
    names = [bundle.manifest.classes[i] for i in (8, 3)]
    words.write_text("\n".join(names))
    to = tmp_path / "sheet.png"
    arguments = ["sheet", str(folder), "--to", str(to), "--prompts", str(words), "--scale", "3"]
    said = CliRunner().invoke(app, [*arguments, "--budgets", "1,2", "--seeds", "2"])
    assert said.exit_code == 0, said.output
    with Image.open(to) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (3 * (4 * 33 + 1 + 4), 3 * (2 * 33 + 1), 3)
    plan = plan_for_budget(bundle.presets, 2).plan
    for row, gap, seed in ((1, 0, 0), (3, 4, 1)):
        for column, label in enumerate((8, 3)):
            y, x = 3 * (1 + 33 * row + gap), 3 * (1 + 33 * column)
            tile = pixels[y : y + 96 : 3, x : x + 96 : 3]
            assert np.array_equal(tile, sample_images(bundle.sampler, plan, [label], [(seed, 0)])[0])


def test_without_budgets_there_is_a_row_for_every_cost(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder, torch.device("cpu"))
    said = CliRunner().invoke(
        app, ["sheet", str(folder), "--to", str(tmp_path / "sheet.png"), "--seeds", "1"]
    )
    costs = sorted({preset.plan.cost for preset in bundle.presets})
    plans = dict.fromkeys(plan_for_budget(bundle.presets, cost).plan.name for cost in costs)
    assert len(plans) > 1 and f"1 blocks of {', '.join(plans)}\n" in said.output


def test_examples_in_several_blocks_end_with_white(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder, torch.device("cpu"))
    manifest = read_manifest(folder)
    few = tmp_path / "few"
    shutil.copytree(folder, few)
    write_manifest(few, manifest.model_copy(update={"examples": manifest.classes[3:6]}))
    to = tmp_path / "sheet.png"
    arguments = ["sheet", str(few), "--to", str(to), "--budgets", "1,2", "--seeds", "1", "--scale", "1"]
    said = CliRunner().invoke(app, [*arguments, "--examples", "--columns", "2"])
    assert said.exit_code == 0, said.output
    with Image.open(to) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (4 * 33 + 1 + 4, 2 * 33 + 1, 3)
    plan = plan_for_budget(bundle.presets, 2).plan
    for row, gap, column, label in ((1, 0, 1, 4), (3, 4, 0, 5)):
        y, x = 1 + 33 * row + gap, 1 + 33 * column
        drawn = sample_images(bundle.sampler, plan, [label], [(0, 0)])[0]
        assert np.array_equal(pixels[y : y + 32, x : x + 32], drawn)
    assert (pixels[2 * 33 + 5 :, 34:] == 255).all(), "there is no fourth example"

    nothing = CliRunner().invoke(app, ["sheet", str(folder), "--to", str(to), "--examples"])
    assert "tiny has no examples" in str(nothing.exception)
    both = CliRunner().invoke(app, [*arguments, "--examples", "--prompts", str(to)])
    assert "not both" in str(both.exception)


def test_all_classes_are_columns_and_an_unknown_one_is_refused(folder: Path, tmp_path: Path) -> None:
    arguments = ["sheet", str(folder), "--to", str(tmp_path / "sheet.png"), "--budgets", "1", "--seeds", "1"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * (10 * 33 + 1), 2 * (33 + 1))
    (tmp_path / "classes.txt").write_text("unicorn")
    refused = CliRunner().invoke(app, [*arguments, "--prompts", str(tmp_path / "classes.txt")])
    assert isinstance(refused.exception, RecipeError)
    assert "'unicorn'" in str(refused.exception) and "it has " in str(refused.exception)
