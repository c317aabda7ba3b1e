"""Bundles with random weights: what is made can be loaded, and wrong wishes are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import random_bundle
from dd_core.bundle import load_bundle
from tests.hub import tiny_spec


def test_the_student_alone_is_made_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_bundle, "find_spec", tiny_spec)
    assert random_bundle.main(["llamagen-dd-b", str(tmp_path / "b")]) == 0
    bundle = load_bundle(tmp_path / "b", torch.device("cpu"))
    assert bundle.sampler.student is not None and bundle.sampler.teacher is None
    assert [preset.plan.name for preset in bundle.presets] == ["dd-1", "dd-2"]


def test_with_its_teacher_it_offers_all_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_bundle, "find_spec", tiny_spec)
    manifest = random_bundle.make("var-dd-d16", tmp_path / "b", teacher=True)
    assert manifest.teacher is not None and "teacher" in [preset.name for preset in manifest.presets]


def test_tiny_is_the_smallest_model(tmp_path: Path) -> None:
    assert random_bundle.main(["tiny", str(tmp_path / "b")]) == 0
    assert load_bundle(tmp_path / "b", torch.device("cpu")).name == "tiny"


def test_what_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert random_bundle.main(["nothing", str(tmp_path / "b")]) == 2
    assert "no published model" in capsys.readouterr().err
    assert random_bundle.main(["llamagen-b-256", str(tmp_path / "b")]) == 2
    assert "teacher alone" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert random_bundle.main(["tiny", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
