"""The roofline at its smallest: its counts against those by hand, and that all stages are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import naive, roofline
from dd_core.engine.arithmetic import BF16
from tests.benchmarks.filed import filed

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", naive.SMOKE)
def test_products_are_counted_where_they_are(name: str) -> None:
    """The head is one product of the tokens before the split, in whole rows of sixteen."""
    size = naive.SMOKE[name]
    work = naive.in_arithmetic(naive.prepare(size, 2, CPU), "exact32")
    costs = roofline.count(work)
    assert list(costs) == list(roofline.STAGES)
    layout, cfg = size.student.layout, size.student
    tokens = min(16 * -(-layout.starts[size.split] // 16), layout.num_tokens)
    assert costs["head"].flop == 2 * 2 * tokens * cfg.dim * cfg.codebook_size
    assert costs["noise"].flop == costs["transfer"].flop == 0
    assert costs["trunk"].flop > 10 * costs["head"].flop and costs["decoder"].flop > 0
    one = roofline.count(naive.in_arithmetic(naive.prepare(size, 1, CPU), "exact32"))
    assert costs["decoder"].flop == 2 * one["decoder"].flop
    pixels = 2 * 3 * (size.vq.sides[-1] if hasattr(size.vq, "sides") else 4) ** 2
    assert costs["transfer"].moved > pixels


def test_attention_is_two_products() -> None:
    q, k = (2, 4, 10, 8), (2, 4, 30, 8)
    assert roofline._attention_flop(q, k, k, 0.0) == 2 * (2 * 2 * 4 * 10 * 30 * 8)


def test_a_view_moves_nothing_and_an_in_place_sum_does() -> None:
    x = torch.ones(4, 8)
    with roofline._Moved() as seen:
        x.view(8, 4).transpose(0, 1)
        assert seen.moved == 0
        x.add_(1.0)
        assert seen.moved == 2 * 4 * 32
        x.clone()
        assert seen.moved == 4 * 4 * 32


def test_the_floor_is_the_larger_of_both() -> None:
    top = roofline.Ceilings({torch.float32: 100.0, torch.bfloat16: 400.0}, 10.0)
    assert top.floor(roofline.Cost(1000, 50), torch.float32) == 10
    assert top.floor(roofline.Cost(1000, 50), torch.bfloat16) == 5
    assert roofline.type_of("trunk", BF16) == torch.bfloat16
    assert roofline.type_of("head", BF16) == torch.float32


def test_smoke_files_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = roofline.Ceilings({torch.float32: 1e12}, 1e11)
    monkeypatch.setattr(roofline, "ceilings", lambda *_: top)
    options = ["--smoke", "--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--pixels", "32"]
    assert roofline.main(options) == 0
    record, page = filed(tmp_path, "roofline")
    found = record["results"]
    assert [(r["model"], r["stage"]) for r in found["rows"]] == [
        (m, s) for m in naive.SMOKE for s in roofline.STAGES
    ]
    for row in found["rows"]:
        assert row["ms"] > 0 and row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
    assert [row["format"] for row in found["encoding"]] == ["png", "jpeg", "webp"]
    assert all(row["cores_per_100"] == pytest.approx(row["ms"] / 10) for row in found["encoding"])
    assert "floor ÷ measured" in page


@pytest.mark.parametrize("option", [["--models", "d99"], ["--arithmetic", "int8"]])
def test_a_wrong_option_is_refused(tmp_path: Path, option: list[str]) -> None:
    assert roofline.main(["--smoke", "--device", "cpu", "--out", str(tmp_path), *option]) == 2
    assert list(tmp_path.iterdir()) == []
