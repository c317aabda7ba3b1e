"""The benchmarks end to end on the tiny bundle, and their arithmetic on numbers made up here."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks import __main__ as both
from benchmarks import engine, http_load, report
from benchmarks.client import Load, Outcome
from benchmarks.processes import Server
from dd_core import plan
from dd_core.bundle import load_bundle
from dd_core.engine import arithmetic
from dd_core.errors import InvalidRequestError
from tests.benchmarks.filed import filed
from tests.tiny import tiny_bundle
from tests.tiny_text import tiny_text_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def _filed(out: Path, theme: str) -> dict[str, Any]:
    record, page = filed(out, theme)
    config = record["configuration"]
    (path,) = (out / theme).glob("*.json")
    assert path.stem == f"{report.machine_slug(config['machine'])}-{config['date'][:10]}"
    assert set(config) == {
        "date", "machine", "software", "threads", "bundle", "commit", "options"
    }  # fmt: skip
    assert {"cpu", "cores", "device", "load_average"} <= set(config["machine"])
    assert torch.__version__.startswith(config["software"]["torch"].partition("+")[0])
    assert config["bundle"]["name"] in ("tiny", "tiny-text") and len(config["bundle"]["digest"]) == 64
    for fact in (config["machine"]["cpu"], config["bundle"]["digest"][:16], config["software"]["torch"]):
        assert fact in page
    return record


def test_engine_files_every_lane_with_ratios_of_its_own_numbers(folder: Path, tmp_path: Path) -> None:
    options = ["--plans", "dd-1,pre-trained-1-21,onestep,teacher", "--batches", "2", "--repeats", "2"]
    assert engine.main(["--bundle", str(folder), "--device", "cpu", "--out", str(tmp_path), *options]) == 0
    record = _filed(tmp_path, "engine")
    assert record["status"] == "ok"
    rows = {row["plan"]: row for row in record["results"]["plans"]}
    assert set(rows) == {
        "dd-1", "pre-trained-1-21", "onestep", "teacher", "dd-1 (not exact)", "teacher (not exact)"
    }  # fmt: skip
    teacher = rows["teacher"]["seconds"]
    for row in rows.values():
        assert len(row["seconds"]) == 2 and row["p95_ms"] >= row["median_ms"] > 0
        assert row["images_per_s"] == pytest.approx(2e3 / row["median_ms"])
        ratios = [a / b for a, b in zip(teacher, row["seconds"], strict=True)]
        assert row["speed_up"] == pytest.approx(sum(ratios) / 2)
    assert {row["plan"] for row in record["results"]["exactness"]} == {"dd-1", "teacher"}
    assert record["results"]["agreement"] == [] and record["results"]["ratios"] == [], (
        "one arithmetic, no dd-2"
    )
    (stages,) = record["results"]["stages"]
    assert set(stages["median_ms"]) == {"noise", "plan", "decode", "to_uint8"}
    assert sum(stages["share"].values()) == pytest.approx(1)


def test_engine_compares_arithmetics_and_names_the_papers_ratios(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "native_bfloat16", lambda _: True)
    options = ["--plans", "dd-1,dd-2,teacher", "--batches", "1", "--repeats", "1", "--compare", "3"]
    options += ["--arithmetic", "exact32,bf16", "--bundle", str(folder), "--device", "cpu"]
    assert engine.main([*options, "--out", str(tmp_path)]) == 0
    found = _filed(tmp_path, "engine")["results"]
    rows = {row["plan"]: row for row in found["plans"]}
    assert {"dd-1 (exact32)", "dd-1 (bf16)", "teacher (bf16)", "dd-1 (bf16, not exact)"} <= set(rows)
    for row in found["ratios"]:
        own = row["arithmetic"]
        assert row["one_step"] == rows[f"dd-1 ({own})"]["speed_up"]
        assert row["two_steps"] == rows[f"dd-2 ({own})"]["speed_up"]
        [ours], [teacher] = rows[f"dd-1 ({own})"]["seconds"], rows[f"teacher ({own})"]["seconds"]
        assert row["one_step"] == pytest.approx(teacher / ours)
    assert [row["arithmetic"] for row in found["ratios"]] == ["exact32", "bf16"]
    assert [row["plan"] for row in found["agreement"]] == ["dd-1", "dd-2", "teacher"]
    near = found["agreement"][0]
    assert near["arithmetic"] == "bf16" and 0.9 < near["tokens"] <= 1 and near["psnr_db"] > 25


def test_engine_times_a_model_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a remainder by no classes ended it, after its comparison."""
    monkeypatch.setattr(arithmetic, "native_bfloat16", lambda _: True)
    bundle = tiny_text_bundle(tmp_path / "texts")
    options = ["--plans", "dd-1", "--batches", "1,2", "--repeats", "1", "--compare", "2"]
    options += ["--arithmetic", "exact32,bf16", "--bundle", str(bundle), "--device", "cpu"]
    assert engine.main([*options, "--out", str(tmp_path)]) == 0
    found = _filed(tmp_path, "engine")["results"]
    assert [row["batch"] for row in found["plans"] if row["plan"] == "dd-1 (bf16)"] == [1, 2]


def test_a_load_of_classes_refuses_a_model_of_texts() -> None:
    answer = {"models": [{"name": "texts", "classes": []}]}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    http = httpx.Client(transport=transport, base_url="http://x")
    with pytest.raises(InvalidRequestError, match=r"bundle must be a model of classes.*texts takes texts"):
        Server(1, 1, http, 1.0).model()


def test_http_load_files_served_over_raw(folder: Path, tmp_path: Path) -> None:
    options = ["--concurrency", "2", "--requests", "10", "--rounds", "1", "--steps", "1", "--threads", "1"]
    assert http_load.main(["--bundle", str(folder), "--device", "cpu", "--out", str(tmp_path), *options]) == 0
    record = _filed(tmp_path, "http-load")
    assert record["status"] == "ok" and record["configuration"]["threads"] == 1
    single, mixed = record["results"]["loads"]
    assert (single["plans"], mixed["load"], len(mixed["plans"])) == (["dd-1"], "mixed", 3)
    for row in (single, mixed):
        (ran,) = row["rounds"]
        assert row["requests"] == 10 and row["failed"] == {}
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"] <= row["latency_ms"]["p99"]
        assert row["served_over_raw"] == pytest.approx(ran["served_per_s"] / ran["raw_per_s"])
        assert 1 <= row["mean_batch"] <= 2
        assert row["client_cpu_ms_per_request"] > 0
    # The server picked the plans that the raw loop ran: every reply names one of them.
    assert set(mixed["latency_ms_by_plan"]) == set(mixed["plans"])
    assert {row["client"] for row in record["results"]["client_costs"]} == {"lean", "httpx"}


def test_speed_up_is_paired_so_drift_does_not_change_it(folder: Path) -> None:
    """The machine halves its speed after the first repeat; the ratio stays 4."""
    bundle = load_bundle(folder, torch.device("cpu"))
    lanes = engine.lanes_of(bundle, ["dd-1", "teacher"])
    seconds = {"dd-1": [1.0, 2.0, 2.0], "teacher": [4.0, 8.0, 8.0]}
    seconds |= {"dd-1 (not exact)": [0.5, 1.0, 1.0], "teacher (not exact)": [4.0, 8.0, 8.0]}
    stages = {"noise": [0.1] * 3, "plan": [0.4] * 3, "decode": [0.4] * 3, "to_uint8": [0.1] * 3}
    found = engine.summarise(lanes, engine.Samples(seconds, stages, {}), 8, "teacher")
    rows = {row["plan"]: row for row in found["plans"]}
    assert rows["dd-1"]["speed_up"] == 4 and rows["teacher"]["speed_up"] == 1
    assert (rows["dd-1"]["median_ms"], rows["dd-1"]["images_per_s"]) == (2000, 4)
    assert [row["exact_over_not_exact"] for row in found["exactness"]] == [2, 1]
    assert found["stages"][0]["sum_over_whole_call"] == pytest.approx(0.5)


def test_a_plan_that_fails_is_filed_and_gives_no_ratio(folder: Path) -> None:
    lanes = engine.lanes_of(load_bundle(folder, torch.device("cpu")), ["dd-1", "teacher"])
    seconds = {lane.name: [1.0, 1.0] for lane in lanes} | {"teacher": [1.0]}
    samples = engine.Samples(seconds, {name: [0.1] for name in engine.STAGES}, {"teacher": "out of memory"})
    found = engine.summarise(lanes, samples, 1, "teacher")
    rows = {row["plan"]: row for row in found["plans"]}
    assert rows["teacher"]["error"] == "out of memory" and rows["teacher"]["median_ms"] is None
    assert rows["dd-1"]["speed_up"] is None and rows["dd-1"]["median_ms"] == 1000
    assert "failed" in engine.table(found)


def test_only_the_teacher_alone_is_the_reference() -> None:
    others = [plan.one_step(64), plan.skip(64, 24), plan.hybrid(64, 0, 20)]
    presets = [plan.Preset(p) for p in others]
    assert engine.teacher_name(presets) is None
    presets.append(plan.Preset(plan.trajectory(64)))
    assert engine.teacher_name(presets) == presets[-1].plan.name, "by the map, where there is no other"
    assert engine.teacher_name([*presets, plan.Preset(plan.teacher(64))]) == "teacher"


def _load(good: int, bad: int, seconds: float) -> Load:
    outcomes = [Outcome("dd-1", "dd-1", 0.1 * (i + 1), None) for i in range(good)]
    return Load(outcomes + [Outcome("dd-1", "", 9.0, "status 429")] * bad, seconds, cpu_seconds=0.5)


def test_served_over_raw_on_made_up_numbers() -> None:
    """Good replies alone count: 10 in 2 s, 10 in 4 s; the raw loop made 10 in 1 s and 12 in 2 s."""
    level = http_load.Level(http_load.Traffic("steps 1", {1: 1}, {1: "dd-1"}), clients=4, raw_batch=4)
    level.loads, level.raw_seconds = [_load(10, 0, 2.0), _load(10, 2, 4.0)], [1.0, 2.0]
    level.images, level.batches = 30, 12
    row = http_load.summarise(level)
    assert [r["served_per_s"] for r in row["rounds"]] == [5, 2.5]
    assert [r["raw_per_s"] for r in row["rounds"]] == [10, 6]
    assert row["served_over_raw"] == pytest.approx((5 / 10 + 2.5 / 6) / 2)
    assert row["requests_per_s"] == pytest.approx(20 / 6)
    assert row["failed"] == {"status 429": 2}
    assert row["latency_ms"]["p50"] == pytest.approx(550) and row["latency_ms"]["p99"] <= 1000 + 1e-6
    assert row["mean_batch"] == 2.5 and row["client_cpu_share"] == pytest.approx(1 / 6)


def test_a_load_without_one_good_reply_still_has_a_row() -> None:
    level = http_load.Level(http_load.Traffic("steps 1", {1: 1}, {1: "dd-1"}), clients=1, raw_batch=1)
    level.loads, level.raw_seconds = [_load(0, 3, 1.0)], [1.0]
    row = http_load.summarise(level)
    assert row["served_over_raw"] is None and row["failed"] == {"status 429": 3}
    assert "| 3 |" in http_load.table({"loads": [row]})


def _config() -> dict[str, Any]:
    return report.configuration(torch.device("cpu"), 1, {"name": "x", "digest": "0" * 64}, {})


def test_a_record_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    """A path of the project is told from its top, another one by its name."""
    given = {"record": report.RESULTS / "engine" / "a.json", "out": tmp_path / "here" / "b.png", "seed": 3}
    given |= {"bundle": str(tmp_path / "d16"), "plans": "dd-1"}
    found = report.configuration(torch.device("cpu"), 1, {"name": "none"}, given)["options"]
    assert found == {"record": "benchmarks/results/engine/a.json", "out": "b.png", "seed": 3} | {
        "bundle": "d16",
        "plans": "dd-1",
    }
    for path in report.RESULTS.rglob("*.*"):
        assert not re.search(r"(?<![\w/.])/(tmp|home|root|work|Users)/", path.read_text()), path


def test_failures_are_filed_with_what_was_measured(tmp_path: Path) -> None:
    def fail() -> None:
        with report.filed("t", _config(), lambda results: str(results["rows"]), tmp_path) as results:
            results["rows"] = [1]
            raise RuntimeError("no more memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more memory"):
            fail()
    files = sorted((tmp_path / "t").glob("*.json"))
    assert len(files) == 2, "a second run must not overwrite the first"
    for file in files:
        record = json.loads(file.read_text())
        assert (record["status"], record["results"]["rows"]) == ("failed", [1])
        assert record["results"]["failures"] == ["RuntimeError: no more memory"]
        assert "no more memory" in file.with_suffix(".md").read_text()


def test_a_run_that_is_terminated_is_filed(tmp_path: Path) -> None:
    """SIGTERM used to end the benchmark at once and leave its server running."""

    def run(_: argparse.Namespace) -> bool:
        with report.filed("t", _config(), str, tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return True

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        report.run_command(run, argparse.Namespace())
    (file,) = (tmp_path / "t").glob("*.json")
    assert json.loads(file.read_text())["status"] == "failed"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("option", [["--bundle", "nowhere"], ["--device", "abacus"], ["--plans", "dd-9"]])
def test_a_wrong_option_is_refused_and_files_nothing(folder: Path, tmp_path: Path, option: list[str]) -> None:
    assert engine.main(["--bundle", str(folder), "--device", "cpu", "--out", str(tmp_path), *option]) == 2
    assert list(tmp_path.iterdir()) == []


def test_make_bench_runs_both_and_reports_the_worse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    for module, fails in ((engine, True), (http_load, False)):

        def run(chosen: argparse.Namespace, fails: bool = fails) -> bool:
            seen.append(chosen)
            return not fails

        monkeypatch.setattr(module, "run", run)
    assert both.main(["--smoke", "--threads", "1", "--out", str(tmp_path)]) == 1
    assert [(s.threads, s.out) for s in seen] == [(1, tmp_path)] * 2
    assert seen[0].repeats == 2 and seen[1].rounds == 1
