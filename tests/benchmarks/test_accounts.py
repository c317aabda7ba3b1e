"""Overhead and soak at their smallest, and what they reckon with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import overhead, soak
from benchmarks.accounts import cpu_seconds, descendants, resident
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def _filed(out: Path, theme: str) -> dict[str, Any]:
    (path,) = (out / theme).glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert record["status"] == "ok" and record["configuration"]["bundle"]["name"] == "tiny"
    return record["results"]  # type: ignore[no-any-return]


def test_processor_time_and_memory_are_those_of_the_process() -> None:
    before = cpu_seconds(os.getpid())
    started = time.process_time()
    while time.process_time() - started < 0.3:
        pass
    assert cpu_seconds(os.getpid()) - before >= 0.25
    held = resident(os.getpid())
    block = bytearray(os.urandom(64 * 2**20))
    assert resident(os.getpid()) - held > 50 * 2**20
    del block


def test_descendants_are_children_and_theirs() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not descendants(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        below = descendants(process.pid)
        assert len(below) == 1 and {process.pid, *below} <= set(descendants(os.getpid()))
        process.communicate(b"\n")


def test_overhead_adds_the_server_and_its_share_of_messages(folder: Path, tmp_path: Path) -> None:
    options = ["--bundle", str(folder), "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert overhead.main([*options, "--smoke", "--profile"]) == 0
    results = _filed(tmp_path, "overhead")
    assert results["message_ms"]["1"] > 0
    for level in results["levels"]:
        assert level["server_ms"] > 0
        assert level["message_ms"] == pytest.approx(results["message_ms"]["1"] / level["images_a_batch"])
        assert level["total_ms"] == pytest.approx(level["server_ms"] + level["message_ms"])
    assert results["profile"] == sorted(results["profile"], key=lambda row: -row["us"])


def test_soak_measures_every_round(folder: Path, tmp_path: Path) -> None:
    options = ["--bundle", str(folder), "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert soak.main([*options, "--smoke"]) == 0
    results = _filed(tmp_path, "soak")
    assert [r["requests"] for r in results["rounds"]] == list(range(5, 101, 5))
    assert all(r["server"] > 2**20 and r["device"] > 2**20 for r in results["rounds"])


def test_growth_is_the_slope_of_the_second_half() -> None:
    requests = list(range(100, 1100, 100))
    assert soak.growth(requests, [10**9] * 5 + [7 * n for n in requests[5:]]) == pytest.approx(7)
    assert soak.growth(requests, [5 * n for n in requests[:5]] + [10**6] * 5) == pytest.approx(0, abs=1e-6)
