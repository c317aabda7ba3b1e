"""The table: what each row is held against, and that no finished row is measured twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dd_core import plan
from dd_core.bundle import load_bundle
from dd_core.errors import InvalidRequestError
from dd_core.sampling import Sampler, sample_images
from tests.tiny import tiny_bundle
from tests.training.fakes import Mean
from tests.training.helpers import pictures_like
from training.data.images import ImageSet
from training.metrics import sets
from training.metrics.fid import frechet_distance
from training.metrics.report import Row
from training.recipes.settings import EvaluateRecipe
from training.stages.evaluate import evaluate_plans

RECIPE = EvaluateRecipe(images=20, reference=40, batch=8)
PLANS = [plan.one_step(64), plan.onestep(64)]
REFERENCE = ImageSet(pictures_like(50, seed=1), torch.arange(50) % 10)
TEST = ImageSet(pictures_like(30, seed=2), torch.arange(30) % 10)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("bundle")), torch.device("cpu")).sampler


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_CACHE", str(tmp_path / "cache"))


def _weights(**changed: str) -> dict[str, str]:
    return dict.fromkeys(("tokenizer", "student", "teacher", "marginal"), "a") | changed


def _run(
    sampler: Sampler,
    out: Path,
    extractor: Mean,
    *,
    weights: dict[str, str] | None = None,
    timing: bool = False,
) -> list[Row]:
    weights = weights or _weights()
    return evaluate_plans(
        sampler,
        PLANS,
        RECIPE,
        REFERENCE,
        TEST,
        out,
        weights=weights,
        seed=3,
        extractor=extractor,
        timing=timing,
    )


def test_every_row_holds_the_right_images_against_the_right_ones(sampler: Sampler, tmp_path: Path) -> None:
    rows = {row.name: row for row in _run(sampler, tmp_path, Mean(), timing=True)}
    assert list(rows) == ["dd-1", "onestep", "reconstruction", "real-test", "real-split"]
    network = Mean()
    reference = network(REFERENCE.images[:40])
    images = load_file(tmp_path / "samples" / "dd-1.safetensors")
    assert images["images"].shape == (20, 32, 32, 3)
    assert images["labels"].tolist() == [i % 10 for i in range(20)]
    assert torch.equal(images["images"][13], sample_images(sampler, PLANS[0], [3], [(3, 13)])[0])
    assert rows["dd-1"].fid == pytest.approx(
        frechet_distance(reference, network(images["images"].permute(0, 3, 1, 2)))
    )
    assert rows["real-test"].fid == pytest.approx(frechet_distance(reference, network(TEST.images[:20])))
    halves = network(TEST.images[:15]), network(TEST.images[15:])
    assert rows["real-split"].fid == pytest.approx(frechet_distance(*halves))
    counts = {name: (r.images, r.reference_images, r.manifold_images) for name, r in rows.items()}
    assert counts["dd-1"] == counts["reconstruction"] == counts["real-test"] == (20, 40, 20)
    assert counts["real-split"] == (15, 15, 15)
    assert (rows["dd-1"].passes, rows["real-test"].passes) == (1, None)
    assert rows["dd-1"].ms_per_image is not None
    assert rows["dd-1"].ms_per_image > 0
    assert rows["reconstruction"].ms_per_image is None


def test_reports_hold_every_row_and_its_images(sampler: Sampler, tmp_path: Path) -> None:
    rows = _run(sampler, tmp_path, Mean())
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [r["name"] for r in record["rows"]] == [r.name for r in rows]
    assert record["settings"]["weights"] == _weights()
    text = (tmp_path / "evaluation.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    for row, line in zip(rows, table[2:], strict=True):
        assert line.startswith(f"| {row.name} |")
        assert f"| {row.images:,} against {row.reference_images:,} | {row.fid:.2f} |" in line
    for grid, size in (("comparison", (10, 2)), ("grids/dd-1", (10, 2)), ("grids/reconstruction", (10, 4))):
        with Image.open(tmp_path / f"{grid}.png") as picture:
            assert picture.size == (2 * (size[0] * 33 + 1), 2 * (size[1] * 33 + 1))
    assert rows[0].metrics()["fid"] == rows[0].fid
    assert "ms_per_image" not in rows[0].metrics()


def test_a_finished_row_is_not_measured_again(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the weights that it needs are others; real images need none."""
    first = _run(sampler, tmp_path, Mean())
    drawn: list[str] = []

    def counted(sampler: Sampler, plan: plan.Plan, *rest: object) -> torch.Tensor:
        drawn.append(plan.name)
        return sample_images(sampler, plan, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sets, "sample_images", counted)
    idle = Mean()
    assert _run(sampler, tmp_path, idle) == first
    assert (idle.seen, drawn) == (0, [])
    real = [(tmp_path / "rows" / f"real-{name}.json").stat().st_mtime_ns for name in ("test", "split")]
    assert _run(sampler, tmp_path, Mean(), weights=_weights(teacher="b", student="b")) == first
    assert drawn == ["dd-1"] * 3
    assert _run(sampler, tmp_path, Mean(), weights=_weights(tokenizer="b")) == first
    assert drawn == ["dd-1"] * 6 + ["onestep"] * 3
    assert real == [
        (tmp_path / "rows" / f"real-{name}.json").stat().st_mtime_ns for name in ("test", "split")
    ]


def test_a_killed_run_ends_as_one_that_was_not(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of drawing, and again in the middle of measuring."""
    whole = _run(sampler, tmp_path / "whole", Mean())
    calls = 0

    def killed(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return sample_images(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sets, "sample_images", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(sampler, tmp_path / "killed", Mean())
    assert len(load_file(tmp_path / "killed" / "samples" / "dd-1.safetensors")["images"]) == 16
    monkeypatch.setenv("DD_CACHE", str(tmp_path / "another cache"))
    with pytest.raises(KeyboardInterrupt):
        _run(sampler, tmp_path / "killed", Mean(stop_after=20))
    assert calls == 4
    assert _run(sampler, tmp_path / "killed", Mean()) == whole


def test_what_cannot_be_evaluated_is_refused(sampler: Sampler, tmp_path: Path) -> None:
    def run(plans: list[plan.Plan], recipe: EvaluateRecipe, test: ImageSet) -> None:
        evaluate_plans(
            sampler, plans, recipe, REFERENCE, test, tmp_path, weights=_weights(), extractor=Mean()
        )

    with pytest.raises(InvalidRequestError, match="one name"):
        run([PLANS[0], PLANS[0]], RECIPE, TEST)
    with pytest.raises(InvalidRequestError, match="60 reference images"):
        run(PLANS, EvaluateRecipe(images=20, reference=60), TEST)
    with pytest.raises(InvalidRequestError, match="10 or more images, not 5"):
        run(PLANS, EvaluateRecipe(images=5, reference=20), TEST)
    with pytest.raises(InvalidRequestError, match="20 test images and has 19"):
        run(PLANS, RECIPE, ImageSet(TEST.images[:19], TEST.labels[:19]))
    with pytest.raises(InvalidRequestError, match="different images"):
        run(PLANS, RECIPE, ImageSet(REFERENCE.images[:30], REFERENCE.labels[:30]))
