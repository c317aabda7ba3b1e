"""The comparison with a naive path end to end at its smallest, and what it must not compare."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import naive, report
from dd_core.engine.arithmetic import BF16
from dd_core.engine.prepared import prepare
from tests.benchmarks.filed import filed

CPU = torch.device("cpu")
SIDES = ("ours", naive.NAIVE)


def test_smoke_files_ratios_of_its_own_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A peak is of the process that runs a variant alone: what this one holds does not show in it."""
    block = torch.ones(2**28)  # 1 GiB
    options = ["--smoke", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert naive.main([*options, "--models", "VAR-DD-smoke"]) == 0
    record, page = filed(tmp_path, "naive")
    assert record["status"] == "ok" and record["configuration"]["threads"] == 1
    assert record["configuration"]["bundle"]["name"] == "random weights"
    assert record["configuration"]["options"]["models"] == ["VAR-DD-smoke"]
    rows = record["results"]["rows"]
    assert [(row["batch"], row["arithmetic"]) for row in rows] == [(2, "exact32")]
    for row in rows:
        seconds, peaks = row["seconds"], row["peak_bytes"]
        assert all(len(seconds[v]) == 2 and min(seconds[v]) > 0 for v in SIDES)
        assert row["time_ratio"] == pytest.approx(report.paired_ratio(seconds["naive"], seconds["ours"]))
        assert row["peak_ratio"] == pytest.approx(peaks["naive"] / peaks["ours"])
        assert all(50e6 < peaks[v] < block.numel() * 4 for v in SIDES)
        assert all(row["working_bytes"][v] >= 0 for v in SIDES)
    assert "VAR-DD-smoke" in page
    assert "naive ÷ ours" in capsys.readouterr().out


@pytest.mark.parametrize("name", naive.SMOKE)
def test_both_paths_make_the_same_images(name: str) -> None:
    work = naive.prepare(naive.SMOKE[name], 3, CPU)
    pixels = naive.ours(work).pixels
    assert pixels.dtype == torch.uint8 and len(pixels) == 3
    assert torch.equal(pixels, naive.naive(work).pixels)
    again = naive.prepare(naive.SMOKE[name], 3, CPU)
    assert torch.equal(pixels, naive.ours(again).pixels), "every process must have the same weights"


@pytest.mark.parametrize("name", naive.SMOKE)
def test_bfloat16_is_compared_by_tokens_and_noise_ratio(name: str) -> None:
    """It was refused for a grey level, though it keeps its tokens."""
    work = naive.prepare(naive.SMOKE[name], 3, CPU)
    low = replace(work, sampler=prepare(work.sampler, BF16))
    runs = {naive.NAIVE: partial(naive.naive, work), "bf16": partial(naive.ours, low)}
    found = naive.measure_seconds(runs, 1, work.sampler.codebook_VC)["bf16"]["agreement"]
    assert 0.75 < found["tokens"] <= 1 and 30 < found["psnr_db"] < 70, "near, and not the same"


def test_a_path_that_makes_other_images_is_no_baseline() -> None:
    work = naive.prepare(naive.SMOKE["VAR-DD-smoke"], 1, CPU)
    other = replace(work, noise_BLC=-work.noise_BLC)
    for name, given in (("bf16", other), ("exact32", other)):
        runs = {naive.NAIVE: partial(naive.naive, work), name: partial(naive.ours, given)}
        with pytest.raises(report.BenchmarkError, match=f"other images: .* in {name}"):
            naive.measure_seconds(runs, 1, work.sampler.codebook_VC)


def test_a_process_that_fails_is_a_failure_of_its_row_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = naive.measure

    def fail(
        name: str, batch: int, repeats: int, device: torch.device, arithmetics: list[str]
    ) -> list[dict[str, object]]:
        if name.startswith("VAR"):
            raise RuntimeError("out of memory")
        monkeypatch.setattr(naive, "peak_on_cpu", lambda *_: {"before": 100, "peak": 150})
        return measured(name, batch, repeats, device, arithmetics)

    monkeypatch.setattr(naive, "measure", fail)
    assert naive.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)]) == 1
    record, _ = filed(tmp_path, "naive")
    assert record["status"] == "failed"
    assert record["results"]["failures"] == ["VAR-DD-smoke, batch 2: RuntimeError: out of memory"]
    (row,) = record["results"]["rows"]
    assert row["model"] == "LlamaGen-DD-smoke" and row["working_ratio"] == 1 and row["peak_ratio"] == 1


def test_a_failing_measuring_process_is_told() -> None:
    with pytest.raises(report.BenchmarkError, match="nothing, batch 1, exact32: KeyError"):
        naive.peak_on_cpu("nothing", 1, "exact32", 1)


@pytest.mark.parametrize(
    "option", [["--models", "VAR-DD-d99"], ["--device", "abacus"], ["--arithmetic", "int8"]]
)
def test_a_wrong_option_is_refused_and_files_nothing(tmp_path: Path, option: list[str]) -> None:
    assert naive.main(["--smoke", "--out", str(tmp_path), *option]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_sizes_are_the_published_ones() -> None:
    var, llamagen = naive.SIZES["VAR-DD-d16"], naive.SIZES["LlamaGen-DD-L"]
    assert (var.student.layout.num_tokens, var.student.codebook_size, var.split) == (680, 4096, 5)
    assert (llamagen.student.layout.num_tokens, llamagen.student.codebook_size, llamagen.split) == (
        256,
        16384,
        130,
    )
