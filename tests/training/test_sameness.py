"""One seed, one picture: what moves the figures, and what an evaluation holds against the teacher."""

from __future__ import annotations

import colorsys
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dd_core import plan
from dd_core.bundle import load_bundle
from dd_core.sampling import sample_images
from tests.tiny import tiny_bundle
from tests.training.fakes import Mean
from tests.training.helpers import pictures_like
from tests.training.test_stages import RandomLpips
from training.data.colours import colour_words, main_hue
from training.data.images import ImageSet
from training.losses.lpips import Lpips
from training.metrics.report import read_another_seed
from training.metrics.sameness import TeachersPictures, same_colour
from training.recipes.settings import EvaluateRecipe
from training.stages.evaluate import evaluate_plans


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    return RandomLpips(tmp_path_factory.mktemp("lpips"))


def _car(red: float, green: float, blue: float, sky: int = 255) -> Tensor:
    """A patch of one colour on a grey ground, `[1, 32, 32, 3]`."""
    picture = torch.full((1, 32, 32, 3), sky, dtype=torch.uint8)
    picture[0, 8:20, 6:26] = torch.tensor([round(255 * c) for c in (red, green, blue)], dtype=torch.uint8)
    return picture


def test_the_main_colour_is_the_hue_of_what_is_coloured() -> None:
    for degrees in range(0, 360, 30):
        for strong, light in ((0.3, 0.9), (0.9, 0.5)):
            found = main_hue(_car(*colorsys.hsv_to_rgb(degrees / 360, strong, light)))
            assert abs((found.item() - degrees + 180) % 360 - 180) <= 5, degrees
    for grey in (_car(0.5, 0.5, 0.5), _car(0.6, 0.55, 0.55), _car(0.5, 0.5, 0.5, sky=0)):
        assert math.isnan(main_hue(grey).item())
    speck = _car(0.5, 0.5, 0.5)
    speck[0, 0, :4] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    assert math.isnan(main_hue(speck).item())  # four pixels are not a picture's colour


def test_red_noise_lies_on_both_sides_of_nought_degrees() -> None:
    picture = torch.tensor([255, 0, 0]).repeat(1, 32, 32, 1)
    picture[..., 1:] += torch.randint(0, 60, (1, 32, 32, 2), generator=torch.Generator().manual_seed(0))
    hue = main_hue(picture.to(torch.uint8)).item()
    assert min(hue, 360 - hue) <= 10


def test_colours_are_the_same_up_to_a_turn() -> None:
    nan = math.nan
    one = torch.tensor([0.0, 350, 10, 240, 0, nan, nan, 120])
    other = torch.tensor([40.0, 30, 340, 300, 180, nan, 0, nan])
    assert same_colour(one, other).tolist() == [True, True, True, False, False, True, False, False]


def test_figures_of_equal_pictures_and_of_others(lpips: Lpips) -> None:
    blue, magenta = _car(0.1, 0.2, 0.9), _car(0.9, 0.1, 0.9)
    images = torch.cat([blue, magenta, blue, blue])
    teacher = TeachersPictures(images, torch.tensor([3, 4, 3, 4]), 2, lpips)
    same = teacher.against(images, torch.tensor([3, 4, 3, 4]))
    assert (same.teacher_lpips, same.same_answer, same.same_colour) == (0, 1, 1)
    drifted = teacher.against(torch.cat([magenta, magenta, blue, blue]), torch.tensor([3, 4, 0, 0]))
    assert (drifted.same_answer, drifted.same_colour) == (0.5, 0.75)
    assert 0 < drifted.teacher_lpips < teacher.against(images.flip(0), torch.zeros(4)).teacher_lpips
    chance = teacher.another_seed()  # pictures 2 and 3 beside 0 and 1
    assert chance is not None
    assert (chance.same_answer, chance.same_colour) == (1, 0.5)
    assert TeachersPictures(images, torch.arange(4), 3, lpips).another_seed() is None


def test_an_evaluation_holds_every_plan_to_the_teachers_pictures_of_its_seeds(
    lpips: Lpips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DD_CACHE", str(tmp_path / "cache"))
    sampler = load_bundle(tiny_bundle(tmp_path / "bundle"), torch.device("cpu")).sampler
    one, all_of_it = plan.one_step(64), plan.teacher(64, draw="flow")

    def run(plans: list[plan.Plan], out: str, judge: Lpips | None = lpips, teacher: str = "a") -> list[Any]:
        rows = evaluate_plans(
            sampler,
            plans,
            EvaluateRecipe(images=20, reference=40, batch=20),
            ImageSet(pictures_like(50, seed=1), torch.arange(50) % 10),
            ImageSet(pictures_like(30, seed=2), torch.arange(30) % 10),
            tmp_path / out,
            weights=dict.fromkeys(("tokenizer", "student", "marginal"), "a") | {"teacher": teacher},
            seed=3,
            extractor=Mean(),
            timing=False,
            lpips=judge,
        )
        return [(row.teacher_lpips, row.same_answer, row.same_colour) for row in rows]

    figures = run([one, all_of_it], "both")
    keys, labels = [(3, i) for i in range(20)], torch.arange(20) % 10
    mine, teachers = (sample_images(sampler, p, labels.tolist(), keys) for p in (one, all_of_it))
    by_hand = TeachersPictures(teachers, labels, 10, lpips).against(mine, labels)
    assert figures[0] == (pytest.approx(by_hand.teacher_lpips), figures[0][1], by_hand.same_colour)
    assert figures[1:] == [(None, None, None)] * 4
    report = (tmp_path / "both" / "evaluation.md").read_text()
    assert f"| dd-1 | {by_hand.teacher_lpips:.3f} | " in report
    assert "| the teacher, another seed | " in report
    settings = json.loads((tmp_path / "both" / "evaluation.json").read_text())["settings"]
    assert set(settings["another_seed"]) == set(by_hand.figures())
    assert read_another_seed(tmp_path / "both") == settings["another_seed"]
    assert read_another_seed(tmp_path / "nothing") == {}
    # A row of another teacher's pictures is measured anew, though the plan itself needs no teacher.
    before = (tmp_path / "both" / "rows" / "dd-1.json").read_text()
    with monkeypatch.context() as patch:
        for measured in ("against", "another_seed"):  # neither a row nor what two seeds have in common
            patch.delattr(TeachersPictures, measured)
        run([one, all_of_it], "both")
    assert (tmp_path / "both" / "rows" / "dd-1.json").read_text() == before
    again = json.loads((tmp_path / "both" / "evaluation.json").read_text())["settings"]
    assert again["another_seed"] == settings["another_seed"]
    run([one, all_of_it], "both", teacher="b")
    assert (tmp_path / "both" / "rows" / "dd-1.json").read_text() != before
    assert run([one], "alone")[0] == run([one, all_of_it], "without", None)[0] == (None, None, None)
    assert "another seed" not in (tmp_path / "without" / "evaluation.md").read_text()


def test_a_main_colour_has_a_word() -> None:
    words = ["red", "orange", "yellow", "green", "blue", "blue", "purple", "pink", "red"]
    for degrees, word in zip((0, 30, 45, 120, 190, 230, 275, 320, 350), words, strict=True):
        assert colour_words(_car(*colorsys.hsv_to_rgb(degrees / 360, 0.9, 0.9))) == [word]
    assert colour_words(_car(*colorsys.hsv_to_rgb(25 / 360, 0.8, 0.5))) == ["brown"]
    assert colour_words(_car(*colorsys.hsv_to_rgb(5 / 360, 0.8, 0.4))) == ["brown"]
    grey, several = _car(0.5, 0.5, 0.5), _car(0.9, 0.1, 0.1)
    several[0, 20:31, 6:26] = torch.tensor([20, 40, 230], dtype=torch.uint8)
    speck = _car(0.5, 0.5, 0.5)
    speck[0, :8, :8] = torch.tensor([255, 0, 0], dtype=torch.uint8)  # its main colour, and not much of it
    assert colour_words(torch.cat([grey, several, speck])) == ["", "", ""]
