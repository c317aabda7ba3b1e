"""Costs that are kept across starts: the file, and what becomes of one that was not written by us."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.devices.kept_costs import CostFile, device_facts
from server.scheduling.costs import Work, WorkCosts
from tests.server.helpers import running

FACTS = {**device_facts("cpu", 1, 2), "buckets": (1, 2, 4), "weights": "w"}
COSTS = {
    Work("tiny", "student"): WorkCosts({1: 0.01, 2: 0.012}, 4),
    Work("tiny", "teacher", "teacher"): WorkCosts({1: 0.002}, 1),
    Work("tiny", "decode"): WorkCosts({1: 0.001}, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> CostFile:
    return CostFile(tmp_path / "not" / "there" / "yet", FACTS)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_costs_are_read_as_they_were_written(file: CostFile) -> None:
    """Under whatever name the weights are served."""
    assert file.read("tiny") == {}
    file.write(COSTS)
    assert file.read("tiny") == COSTS
    assert set(file.read("other")) == {work._replace(model="other") for work in COSTS}


@pytest.mark.parametrize("name", FACTS)
def test_costs_of_something_else_are_in_another_file(file: CostFile, name: str) -> None:
    file.write(COSTS)
    other = CostFile(file.folder, {**FACTS, name: (1, 2) if name == "buckets" else "other"})
    assert other.path != file.path and other.read("tiny") == {}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)], ids=oct)
def test_others_may_read_the_file_as_the_umask_says(
    file: CostFile, umask: Callable[[int], int], mask: int, mode: int
) -> None:
    umask(mask)
    file.write(COSTS)
    assert stat.S_IMODE(file.path.stat().st_mode) == mode
    assert list(file.path.parent.iterdir()) == [file.path], "nothing is left beside it"


def change(content: dict[str, Any], **entry: object) -> dict[str, Any]:
    return {**content, "costs": [{**content["costs"][0], **entry}]}


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no object": lambda content: [content],
    "another's facts": lambda content: {**content, "follows_from": {}},
    "no costs": lambda content: {"follows_from": content["follows_from"]},
    "something more": lambda content: {**content, "more": 1},
    "costs that are none": lambda content: {**content, "costs": {}},
    "no such kind": lambda content: change(content, kind="oracle"),
    "no time at all": lambda content: change(content, seconds={"1": 0.0}),
    "less than none": lambda content: change(content, seconds={"1": -1.0}),
    "no number": lambda content: change(content, seconds={"1": float("nan")}),
    "without an end": lambda content: change(content, seconds={"1": float("inf")}),
    "a text": lambda content: change(content, seconds={"1": "0.1"}),
    "no bucket": lambda content: change(content, seconds={"one": 0.1}),
    "another bucket": lambda content: change(content, seconds={"1": 0.1, "3": 0.1}),
    "not the smallest": lambda content: change(content, seconds={"2": 0.1}),
    "no such limit": lambda content: change(content, largest=2**40),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_used_is_passed_over(
    file: CostFile, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file.write(COSTS)
    content = json.loads(file.path.read_text())
    file.path.write_text(json.dumps(DAMAGES[damage](content)))
    assert file.read("tiny") == {}
    assert "passed over" in caplog.text
    file.write(COSTS)
    assert file.read("tiny") == COSTS


def test_a_pipe_in_its_place_is_passed_over_and_not_waited_for(
    file: CostFile, caplog: pytest.LogCaptureFixture
) -> None:
    file.path.parent.mkdir(parents=True)
    os.mkfifo(file.path)
    assert file.read("tiny") == {}
    assert "passed over: not a regular file" in caplog.text


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\x00", b"[" * 100_000, b" " * 2**21], ids=len)
def test_a_file_that_is_no_json_is_passed_over(
    file: CostFile, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file.write(COSTS)
    file.path.write_bytes(text)
    assert file.read("tiny") == {}
    assert "passed over" in caplog.text


def test_where_nothing_can_be_kept_nothing_fails(
    file: CostFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in the file's place, a file in the folder's, no home."""
    caplog.set_level("INFO")
    file.path.mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.delenv("DD_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    for one in (file, CostFile(tmp_path / "file", FACTS), CostFile(None, FACTS)):
        assert one.read("tiny") == {}
        caplog.clear()
        one.write(COSTS)
        assert "not kept" in caplog.text


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_their_place_is_the_home_of_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DD_HOME", str(tmp_path))
    assert CostFile(None, FACTS).path.parent == tmp_path / "costs"


def test_a_start_keeps_its_costs_and_the_next_one_checks_them(bundle_folder: Path, tmp_path: Path) -> None:
    """Costs that are wrong by far are measured anew, and kept in the place of the wrong ones."""
    options = {"device": "cpu,cpu", "max_batch": 2, "costs_folder": tmp_path}
    with running(bundle_folder, **options):
        pass
    [path] = tmp_path.iterdir()
    content = json.loads(path.read_text())
    kept = {(entry["kind"], entry["plan"]): entry["seconds"] for entry in content["costs"]}
    assert len(kept) > 2 and ("decode", "") in kept
    for entry in content["costs"]:
        entry["seconds"] = {bucket: 1000.0 + seconds for bucket, seconds in entry["seconds"].items()}
    path.write_text(json.dumps(content))
    with running(bundle_folder, **options) as live:
        pool = live.state.pool
        assert pool is not None
        table = pool._workers[0].scheduler.costs
        [again] = tmp_path.iterdir()
        assert again == path
        for entry in json.loads(path.read_text())["costs"]:
            work = Work("tiny", entry["kind"], entry["plan"])
            assert 0 < entry["seconds"]["1"] == table.seconds(work, 1) < 1000


def test_costs_of_a_bundle_that_is_changed_as_it_loads_are_not_kept(
    bundle_folder: Path, tmp_path: Path
) -> None:
    """They do not follow from its weights."""
    with running(bundle_folder, _same, max_batch=1, costs_folder=tmp_path):  # type: ignore[arg-type]
        pass
    assert not [*tmp_path.iterdir()]


def _same(bundle: object) -> object:
    return bundle
