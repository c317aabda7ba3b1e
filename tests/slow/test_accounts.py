"""Overhead and soak end to end, at their smallest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import overhead, soak
from tests.benchmarks.filed import filed
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def _filed(out: Path, theme: str) -> dict[str, Any]:
    record, _ = filed(out, theme)
    assert record["status"] == "ok" and record["configuration"]["bundle"]["name"] == "tiny"
    return record["results"]  # type: ignore[no-any-return]


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
