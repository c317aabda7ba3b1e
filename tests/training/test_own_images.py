"""Your own images, from a folder to a bundle, in both families; and what the run remembers of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dd_core.bundle import load_bundle
from dd_core.models.config import scales
from dd_core.sampling import sample_images
from tests.training.fakes import Mean
from tests.training.helpers import draw_folder
from training.cli import main
from training.data.folders import load_folder
from training.metrics import timing
from training.metrics.features import content_hash
from training.recipes.named import get_recipe
from training.recipes.own_images import for_images
from training.recipes.saved import read_recipe
from training.recipes.settings import Folder
from training.stages import evaluate

CPU = torch.device("cpu")
CLASSES = {"red fox": 30, "10 owls": 24, "9 hens": 26}
SHORT = (
    *(
        f"{stage}.{field}"
        for stage in ("tokenizer", "decoder", "teacher", "distill")
        for field in ("steps=2", "batch=4")
    ),
    *(f"{stage}.lpips_share=0.1" for stage in ("tokenizer", "distill")),
    *("pairs.count=24", "pairs.batch=24", "pairs.shard=24", 'evaluate.plans=["dd-1", "dd-2"]'),
)


def sets(*overrides: str) -> list[str]:
    """As the command line has them."""
    return [part for override in overrides for part in ("--set", override)]


@pytest.fixture(autouse=True)
def _surroundings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
    monkeypatch.setattr(timing, "_REPEATS", 1)
    monkeypatch.setattr(evaluate, "FeatureExtractor", lambda *_: Mean())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "My photos", CLASSES)


@dataclass
class Trainer:
    """The command line."""

    patch: pytest.MonkeyPatch
    output: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> None:
        status, said = self._run(arguments)
        assert status == 0, said

    def refusal(self, *arguments: object) -> str:
        """What it says instead of doing it."""
        status, said = self._run(arguments)
        assert status == 2 and "Traceback" not in said
        return said.partition("dd-train: ")[2]

    def _run(self, arguments: Sequence[object]) -> tuple[object, str]:
        self.output.readouterr()
        self.patch.setattr("sys.argv", ["dd-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, " ".join(self.output.readouterr().err.split())


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Trainer:
    return Trainer(monkeypatch, capsys)


def test_a_folder_becomes_a_bundle_by_commands_that_name_it_once(
    train: Trainer, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    deep = sets("tokenizer_model.channel_multipliers=[1, 1, 1, 1]", *SHORT)
    train("tokenizer", "--recipe", "tiny", "--data", photos, "--size", 64, "--out", out, *deep)
    for stage in ("decoder", "teacher", "pairs", "distill", "evaluate"):
        train(stage, "--out", out)
    train("export", "--out", out, "--to", tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle", CPU)
    manifest = bundle.manifest
    assert (manifest.name, manifest.image_size) == ("my-photos", 64)
    assert manifest.classes == ["9 hens", "10 owls", "red fox"]
    assert "3 classes of My photos at 64×64" in manifest.description and "80 images" in manifest.data
    assert str(tmp_path) not in manifest.model_dump_json(), "nor does it say where they lie"
    for preset in bundle.presets:
        picture = sample_images(bundle.sampler, preset.plan, [0, 1, 2], [(0, 0), (0, 1), (0, 2)])
        assert picture.shape == (3, 64, 64, 3)
    report = json.loads((out / "evaluation" / "evaluation.json").read_text())
    images = load_folder(photos, 64)
    assert report["settings"]["reference"] == content_hash(images.train.images[:32], images.train.labels[:32])
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["real-split"]["images"] == len(images.test.labels) // 2 == 10

    deep = sets("tokenizer_model.channel_multipliers=[1, 1, 1, 1]")
    begun = ("--recipe", "tiny", "--data", photos, "--size", 64, "--out", tmp_path / "on", *deep)
    train("start", tmp_path / "bundle", *begun)
    assert load_file(tmp_path / "on" / "tokens.safetensors")["labels"].bincount().tolist() == [19, 18, 22]

    (photos / "red fox" / "0.png").unlink()
    assert train.refusal("evaluate", "--out", out).startswith(
        f"{photos} has changed since this run was begun: 80 images of 3 classes then, 79 of 3 now;"
    )
    train("export", "--out", out, "--to", tmp_path / "again")  # which needs no image


def test_a_folder_becomes_a_bundle_in_next_scale_order(train: Trainer, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("all", "--recipe", "var-tiny", "--data", photos, "--size", 64, "--out", out, *sets(*SHORT))
    train("export", "--out", out, "--to", tmp_path / "bundle", "--name", "zoo")
    bundle = load_bundle(tmp_path / "bundle", CPU)
    assert bundle.manifest.classes == ["9 hens", "10 owls", "red fox"]
    assert bundle.manifest.model.layout.block_sizes == (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)
    two = next(preset.plan for preset in bundle.presets if preset.plan.name == "dd-2")
    assert [(s.start, s.stop) for s in two.segments] == [(0, 5), (5, 10)] and two.split == 5
    assert sample_images(bundle.sampler, two, [2], [(0, 0)]).shape == (1, 64, 64, 3)


def test_the_folder_may_move_but_not_become_another(train: Trainer, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("tokenizer", "--recipe", "tiny", "--data", photos, "--out", out, *sets(*SHORT))
    moved = photos.rename(tmp_path / "moved")
    assert "is no folder" in train.refusal("tokenizer", "--out", out)
    train("tokenizer", "--out", out, "--data", moved)
    recipe = read_recipe(out)
    assert recipe is not None and recipe.folder is not None and recipe.folder.path == str(moved)
    other = draw_folder(tmp_path / "other", {"a": 40, "b": 40})
    assert "has changed" in train.refusal("tokenizer", "--out", out, "--data", other)
    assert "begun with images of 32 pixels, not 64" in train.refusal("tokenizer", "--out", out, "--size", 64)
    assert read_recipe(out) == recipe


def test_letters_need_not_be_mirrored(train: Trainer, photos: Path, tmp_path: Path) -> None:
    for mirror, flips in (("true", 2), ("false", 1)):
        out = tmp_path / mirror
        given = sets(*SHORT, f"mirror={mirror}")
        train("tokenizer", "--recipe", "tiny", "--data", photos, "--out", out, *given)
        assert load_file(out / "tokens.safetensors")["tokens"].shape == (flips, 59, 64)
    train("teacher", "--out", tmp_path / "false")
    train("decoder", "--out", tmp_path / "false")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--size", "50"],
            "a multiple of 4, by which the tokenizer shrinks an image: 48 or 52, not 50",
        ),
        (["--size", "8"], "--size must be at least 16, not 8"),
        (["--size", "-4"], "--size must be at least 16, not -4"),
        (["--size", "128"], "80 of the 80 images of {photos} are smaller than 128 pixels"),
        (["--recipe", "text-tiny"], "the recipe 'text-tiny' learns from texts; --data takes one of classes"),
        (["--data", "{photos}/red fox"], "has no sub-folders"),
        (["--data", "{photos}/red fox/0.png"], "is no folder"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_made(
    more: list[str], says: str, train: Trainer, photos: Path, tmp_path: Path
) -> None:
    given = [part.format(photos=photos) for part in more]
    chosen = ("--recipe", "tiny", "--data", photos, "--out", tmp_path / "run")
    assert says.format(photos=photos) in train.refusal("all", *chosen, *given)
    assert not (tmp_path / "run").exists()


def test_settings_are_refused_before_images_are_decoded(
    train: Trainer, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DD_CACHE", str(tmp_path / "cache"))
    for wrong in ("teacher.stepz=3", "tokenizer_model.side=3", "seed=x"):
        assert train.refusal("all", "--data", photos, "--out", tmp_path / "run", "--set", wrong)
    assert not (tmp_path / "cache" / "folders").exists()


def test_a_size_without_images_and_no_folder_of_images_are_refused(train: Trainer, tmp_path: Path) -> None:
    chosen = ("--recipe", "tiny", "--out", tmp_path / "run")
    assert "--size goes with --data" in train.refusal("all", *chosen, "--size", 64)
    assert "folder must come with --data DIR, for data=folder" in train.refusal(
        "all", *chosen, "--set", "data=folder"
    )
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize(
    ("side", "sides"),
    [
        (1, (1,)),
        (4, (1, 2, 3, 4)),
        (8, (1, 2, 3, 4, 5, 6, 8)),
        (16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
        (32, (1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 17, 21, 26, 32)),
    ],
)
def test_scales_are_four_fifths_of_the_next(side: int, sides: tuple[int, ...]) -> None:
    assert scales(side) == sides


@pytest.mark.parametrize(
    ("name", "size", "steps", "split"),
    [("cpu", 64, (0, 80), None), ("cpu", 32, (0, 20), None), ("tiny", 16, (0, 5), None),
     ("var-cpu", 64, (0, 5), None), ("var-gpu", 64, (0, 4), 4), ("var-tiny", 32, (0, 2), 2)],
)  # fmt: skip
def test_training_steps_keep_their_share_of_the_way(
    name: str, size: int, steps: tuple[int, ...], split: int | None
) -> None:
    """20 of 64 tokens are 80 of 256, as in the paper; of scales, 3 of 6 are 5 of 10."""
    recipe = for_images(get_recipe(name), Folder("x", ("a", "b"), 100, ""), size, 80, 20)
    assert recipe.image_size == size and recipe.model.num_classes == 2
    assert (recipe.distill.train_steps, recipe.distill.split) == (steps, split)
    assert recipe.evaluate.reference <= 80 and recipe.evaluate.test == 20
    assert (size == 32) == (recipe.model.layout == get_recipe(name).model.layout)
