"""What the benchmark of published sizes must not let pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import full_size, report
from benchmarks.processes import environment
from tests.benchmarks.filed import filed

NAME = "llamagen-dd-l"


def record_of(out: Path) -> dict[str, Any]:
    record, page = filed(out, "full-size")
    assert NAME in page
    return record


def test_a_step_that_fails_says_what_dd_server_said() -> None:
    with pytest.raises(report.BenchmarkError, match=r"dd-server pull var-dd-d17: .*did you mean var-dd-d16"):
        full_size._step(["pull", "var-dd-d17"], True, environment(1))


def test_a_hub_that_does_not_start_is_told_and_not_replaced_by_the_real_one(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "empty").write_bytes(b"")  # cannot be mapped
    with (
        pytest.raises(report.BenchmarkError, match="did not start"),
        full_size._hub(tmp_path),
    ):
        pytest.fail("an empty address means the real hub")


class _Server:
    """Answers of a server, made up."""

    port = 0

    def model(self) -> dict[str, Any]:
        return {"name": "x", "classes": ["a"], "budgets": [{"from": 1, "to": 1, "plan": "dd-1"}]}


@pytest.mark.parametrize(
    ("replies", "says"),
    [
        ([("dd-1", b"a"), ("dd-1", b"b")], "other bytes"),
        ([("dd-2", b"a"), ("dd-2", b"a")], "dd-2 answered for dd-1"),
    ],
)
def test_wrong_answers_are_failures(
    monkeypatch: pytest.MonkeyPatch, replies: list[tuple[str, bytes]], says: str
) -> None:
    monkeypatch.setattr(full_size, "_generate", lambda *_: (1.0, *replies.pop(0)))
    with pytest.raises(report.BenchmarkError, match=says):
        full_size.ask_every_budget(_Server(), [])  # type: ignore[arg-type]


def test_a_model_that_fails_is_filed_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(spec: Any, *rest: Any) -> None:
        rest[-1]["pull"] = {"seconds": 1.0, "peak_bytes": 2**20}
        if spec.name == NAME:
            raise report.BenchmarkError("dd-server convert: no room")

    monkeypatch.setattr(full_size, "measure", fail)
    options = ["--smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert full_size.main(options) == 1
    record = record_of(tmp_path)
    assert record["status"] == "failed"
    assert record["results"]["failures"] == [f"{NAME}: BenchmarkError: dd-server convert: no room"]
    assert set(record["results"]["models"]) == set(full_size.MODELS)
    assert record["results"]["models"][NAME]["pull"]["seconds"] == 1


@pytest.mark.parametrize(
    "option", [["--models", "var-dd-d99"], ["--device", "abacus"], ["--scratch", "gone"]]
)
def test_a_wrong_option_is_refused_and_files_nothing(tmp_path: Path, option: list[str]) -> None:
    assert full_size.main(["--smoke", "--out", str(tmp_path), *option]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_default_models_are_served_at_their_published_sizes() -> None:
    specs = full_size.specs_of(full_size.MODELS, smoke=False)
    assert (specs["var-dd-d16"].teacher.depth, specs["llamagen-dd-l"].teacher.layers) == (16, 24)  # type: ignore[union-attr]
    assert all(len(spec.classes) == 1000 for spec in specs.values())
