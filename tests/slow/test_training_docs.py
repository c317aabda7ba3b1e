"""Every training command of the documentation, run as it stands there, with recipes of the size of a test."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dd_core.hub.convert import convert
from dd_core.hub.pull import LocalFile
from dd_core.hub.spec import ModelSpec
from dd_core.hub.storage import models_folder
from dd_core.models.config import MultiScaleConfig, VARConfig
from tests.hub import content_of, random_modules, saved, tiny_spec
from tests.tiny_text import tiny_text_bundle
from tests.training import fakes
from tests.training.conftest import _no_loss_curves as _no_loss_curves
from tests.training.helpers import draw_folder
from tests.training.test_prompts_alone import FewWords, publish, tiny_t2i
from training import cli, guidance
from training.data import text
from training.metrics import caption_retrieval, timing
from training.recipes.named import RECIPES, get_recipe
from training.recipes.settings import EvaluateRecipe, Recipe
from training.stages import distill, evaluate, student_fid, teacher

ROOT = Path(__file__).parents[2]
# The README's picture is drawn from a bundle that the pages make.
PAGES = [*sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "commands.md"), ROOT / "README.md"]
LAUNCHER = re.compile(r"torchrun .* -m training|python -m training(?!\.)|dd-train")
# Words of the commands that stand for something of the size of a test, or for what an earlier command made.
SMALLER = {
    "cifar10": "my-bundle",
    "var-cpu": "cpu",  # as that bundle; tests/training/test_recipes.py holds recipes to the built-in models
    "text-var-cpu": "text-cpu",  # alike
    "pictograms": "my-pictograms",
    "64": "32",
    "5000": "10",
    "500": "10",
    "50000": "10",
    "teacher.steps=+2000": "teacher.steps=+2",
    "/shared/gpu": "shared/gpu",
    "evaluate.images=2000": "evaluate.images=10",
    "8,20,40": "8,20",
    "5000,10000,20000": "4,8",
}


def _commands(page: Path) -> list[list[str]]:
    """The arguments of every `dd-train` in code blocks of a page, and of those with options in its text."""
    content = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for line in content.splitlines():
        block = line.removeprefix("    ") if line.startswith("    ") else ""
        inside = re.findall(r"`(dd-train [a-z-]+ [^`]*--[^`]*)`", line)
        found += [code[m.end() :] for code in (block, *inside) if (m := LAUNCHER.match(code))]
    commands = [[SMALLER.get(word, word) for word in shlex.split(code, comments=True)] for code in found]
    for words in commands:
        if "--reference" in words and "--images" not in words:
            words += ["--images", "10"]
    return commands


def _tiny(name: str, base: str = "tiny") -> Recipe:
    """One step of each stage, for a recipe's name."""
    stages = ("tokenizer", "decoder", "teacher", "distill")
    given = [f"{stage}.{field}" for stage in stages for field in ("steps=1", "batch=2")]
    given += ["pairs.count=8", "pairs.batch=8", "pairs.shard=8", "train_images=24"]
    small = EvaluateRecipe(images=10, reference=10, test=20, batch=10, plans=("dd-1",))
    return replace(get_recipe(base, given), name=name, evaluate=small)


def _publish_var(name: str, folder: Path) -> ModelSpec:
    """A published model of VAR's layout, converted from files as the authors' are, at 16 pixels."""
    spec, sides = tiny_spec(name), (1, 2, 4, 8)
    assert isinstance(spec.vq, MultiScaleConfig)
    parts = {
        part: replace(cfg, sides=sides)
        for part in ("teacher", "student")
        if isinstance(cfg := getattr(spec, part), VARConfig)
    }
    spec = replace(spec, image_size=16, vq=replace(spec.vq, sides=sides), **parts)
    files = {}
    for part, module in random_modules(spec).items():
        path = folder / f"{name}-{part}.pth"
        path.write_bytes(saved(content_of(spec, part, module)))
        files[part] = LocalFile.by_hand(part, path)
    convert(spec, files, models_folder() / name)
    return spec


def _tiny_var(spec: ModelSpec) -> Recipe:
    """The recipe of that model's student."""
    whole, tiny = get_recipe("var-dd-d16"), _tiny("var-dd-d16")
    assert spec.teacher is not None
    return replace(
        whole,
        tokenizer_model=spec.vq,
        model=spec.teacher,
        pairs=replace(whole.pairs, count=16, batch=16, shard=16),
        distill=replace(tiny.distill, train_steps=(0, 2), split=2),
    )


@pytest.fixture(scope="module")
def place(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which a reader types: with the pictures, prompts and references that the pages name."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        fakes.install(cache, patch)
        patch.chdir(place)
        patch.setenv("DD_HOME", str(place / "home"))
        patch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))
        patch.setattr(caption_retrieval, "_STEPS", 20)
        patch.setattr(timing, "_REPEATS", 1)
        patch.setattr(text, "t5_states", FewWords)
        for stage in (teacher, distill):
            patch.setattr(stage, "sample_grid", lambda *_: None)
        for module in (cli, evaluate, guidance, student_fid):
            patch.setattr(module, "FeatureExtractor", lambda *_: fakes.Mean())
        for name, base in (("cpu", "tiny"), ("gpu", "tiny"), ("text-cpu", "text-tiny")):
            patch.setitem(RECIPES, name, _tiny(name, base))
        patch.setitem(RECIPES, "llamagen-t2i", tiny_t2i())
        _publish_var("var-dd-d16", place)
        patch.setitem(RECIPES, "var-dd-d16", _tiny_var(_publish_var("var-d16", place)))
        publish(models_folder() / "llamagen-t2i-256", tiny_t2i())
        draw_folder(place / "photos", {"a": 24, "b": 24}, (32, 32))
        tiny_text_bundle(place / "my-t2i")
        pictures = draw_folder(place / "pictures", {"any": 12}, (32, 32)) / "any"
        listed = (f"any/{path.name}\tred cat {i}\n" for i, path in enumerate(sorted(pictures.iterdir())))
        (place / "captions.tsv").write_text("".join(listed))
        (place / "prompts.txt").write_text("red cat\nblue heart\na dog\n")
        real = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
        np.savez(place / "VIRTUAL_imagenet256_labeled.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=real)
        yield place
    text.encoder.cache_clear()


def _before(arguments: list[str]) -> None:
    """Make what a page says in words: runs by the recipe `gpu`, and one that has no pairs yet."""
    one, finished = Path("runs/cpu"), Path("finished")
    if arguments[0] == "teacher":
        shutil.move(one, finished)
        shutil.copytree(finished, one, ignore=shutil.ignore_patterns("pairs", "student.pt"))
    if "evaluate_every=250" in arguments:  # the finished run again, whose student is distilled anew
        shutil.rmtree(one)
        shutil.copytree(finished, one, ignore=shutil.ignore_patterns("student.*"))
    if arguments[:3] == ["distill", "--recipe", "gpu"]:
        other = Path(arguments[-1])
        shutil.copytree(finished, other, ignore=shutil.ignore_patterns("student.pt"))
        recipe = other / "recipe.json"
        recipe.write_text(recipe.read_text().replace('"name": "cpu"', '"name": "gpu"'))


def test_the_pages_have_commands() -> None:
    """The other test here passes on pages without any; this one does not."""
    found = {page.name: len(_commands(page)) for page in PAGES}
    assert found["08-training.md"] > 15 and found["14-text.md"] > 7, found


@pytest.mark.parametrize("page", [p for p in PAGES if _commands(p)], ids=lambda page: page.name)
def test_every_command_of_a_page_does_what_it_says(page: Path, place: Path) -> None:
    for arguments in _commands(page):
        _before(arguments)
        cli.app(arguments, standalone_mode=False)
        if "--to" in arguments:
            assert Path(arguments[arguments.index("--to") + 1]).exists()
