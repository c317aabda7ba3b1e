"""Prepared models against recorded tensors: each arithmetic is off by what it rounds, and by no more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dd_core.engine import arithmetic as named
from dd_core.engine import prepared
from dd_core.engine.arithmetic import BF16, EXACT32, FP16, Arithmetic
from dd_core.models.var import VARStudent
from tests.conformance import arithmetics
from tests.conformance.__main__ import main
from tests.conformance.test_conformance import OWN, RECORDED

# Less would be another arithmetic than its name says. In float32 a fold may come out equal, as one does on
# AMD's CPUs.
LEAST = {"exact32": 0.0, "bf16": 1e-3, "fp16": 1e-4}


@pytest.mark.parametrize("arithmetic", [EXACT32, BF16, FP16], ids=lambda a: a.name)
@pytest.mark.parametrize("folder", [OWN, RECORDED], ids=["own", "recorded"])
def test_deviations_are_those_of_rounding(folder: Path, arithmetic: Arithmetic) -> None:
    if not folder.exists():
        pytest.skip("no recorded tensors here")
    rows = arithmetics.measure(folder, arithmetic)
    assert {row.kind for row in rows} == {"teacher's logits", "embedding head", "logits head", "image"}
    assert {row.fixture for row in rows} == set(arithmetics.CHECKS)
    for row in rows:
        assert row.explained(arithmetic), row
        assert row.relative >= LEAST[arithmetic.name], row


def test_a_wrong_fold_is_not_rounding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fold = prepared.FoldedStudent

    def wrong(student: VARStudent, arithmetic: Arithmetic, **more: bool) -> object:
        student.head.weight.data.mul_(1.01)  # type: ignore[union-attr]
        return fold(student, arithmetic, **more)

    monkeypatch.setattr(prepared, "FoldedStudent", wrong)
    monkeypatch.setattr(sys, "argv", ["conformance", str(OWN), "--arithmetic", "exact32"])
    assert main() == 1
    assert "| var_dd | logits head |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["int4", "bf16"])
def test_an_arithmetic_that_there_is_not_gets_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(named, "native_bfloat16", lambda _: False)
    monkeypatch.setattr(sys, "argv", ["conformance", str(OWN), "--arithmetic", name])
    assert main() == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("conformance: arithmetic") and name in line
