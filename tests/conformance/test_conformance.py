"""The check passes on what is recorded, and fails on anything that is not right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dd_core.models import layers, multiscale_vq, var
from tests.conformance.__main__ import CHECKS, main, run
from tests.conformance.record import record

OWN = Path(__file__).parent / "fixtures"
RECORDED = Path(os.environ.get("DD_FIXTURES") or Path(__file__).parents[2].parent / "shared" / "fixtures")


def _status(monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["conformance", str(folder), "--failures"])
    return main()


def _rehash(folder: Path, name: str) -> None:
    """Makes the manifest agree with a file, so that what comes behind the hash decides."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _edit(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, str(folder / name))
    _rehash(folder, name)


def _copy_of(folder: Path, *names: str) -> Path:
    """Our own files with some of the fixtures, in a folder that may be damaged."""
    shutil.copytree(OWN, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["fixtures"] = {name: manifest["fixtures"][name] for name in names}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return _copy_of(tmp_path / "fixtures", "lg_dd")


def test_our_own_fixtures_pass_and_are_of_every_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(monkeypatch, OWN) == 0
    assert "0 failed" in capsys.readouterr().out
    manifest = json.loads((OWN / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["fixtures"]) == set(CHECKS)
    files = {path.name for path in OWN.iterdir()} - {"manifest.json"}
    assert files == set(manifest["files"])
    assert sum((OWN / name).stat().st_size for name in files) < 1.5e6


def test_what_the_released_code_computed_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (RECORDED / "manifest.json").exists():
        pytest.skip("no tensors recorded from the released code here: DD_FIXTURES names their folder")
    status = _status(monkeypatch, RECORDED)
    assert status == 0, capsys.readouterr().out


def test_a_new_recording_is_the_one_that_is_kept(tmp_path: Path) -> None:
    """The recorder makes the kept folder, up to the last bits of float64 on another machine."""
    with torch.inference_mode():
        record(tmp_path)
    new, kept = (json.loads((f / "manifest.json").read_text(encoding="utf-8")) for f in (tmp_path, OWN))
    assert set(new["files"]) == set(kept["files"])
    for name in kept["fixtures"]:
        for part in ("io", "weights", "config", "cases"):
            assert new["fixtures"][name][part] == kept["fixtures"][name][part], name
    for name in kept["files"]:
        ours, theirs = load_file(tmp_path / name), load_file(OWN / name)
        assert set(ours) == set(theirs), name
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype, key
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_the_copy_passes(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    """Or the failures below would show nothing."""
    assert _status(monkeypatch, copy) == 0


def _add(name: str, amount: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[3].add_(amount)


@pytest.mark.parametrize("amount", [1e-2, float("nan"), float("-inf")])
def test_a_changed_value_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], copy: Path, amount: float
) -> None:
    _edit(copy, "lg_dd.io.safetensors", _add("out.mixed.tokens", amount))
    assert _status(monkeypatch, copy) == 1
    assert "mixed.tokens" in capsys.readouterr().out


def test_a_value_within_the_tolerance_passes(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    _edit(copy, "lg_dd.io.safetensors", _add("out.mixed.tokens", 5e-5))
    assert _status(monkeypatch, copy) == 0


def test_a_flipped_index_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = _copy_of(tmp_path / "fixtures", "lg_vq")

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors["out.enc_idx"][0, 0] = (tensors["out.enc_idx"][0, 0] + 1) % 8

    _edit(folder, "lg_vq.io.safetensors", flip)
    assert _status(monkeypatch, folder) == 1
    out = capsys.readouterr().out
    assert "enc_idx" in out and "1 of 18 differ" in out


def test_an_unknown_kind_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], copy: Path
) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["fixtures"]["lg_next"] = manifest["fixtures"]["lg_dd"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert _status(monkeypatch, copy) == 1
    assert "no check for this kind" in capsys.readouterr().out


def test_an_output_that_nobody_compares_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], copy: Path
) -> None:
    _edit(copy, "lg_dd.io.safetensors", lambda t: t.update({"out.t0.attention": torch.zeros(2)}))
    assert _status(monkeypatch, copy) == 1
    assert "no check compares it" in capsys.readouterr().out


@pytest.mark.parametrize("kind", sorted(CHECKS))
def test_a_quantity_that_was_left_out_fails(tmp_path: Path, kind: str) -> None:
    """Any of them: also one that a check compares only where it is recorded."""
    folder = _copy_of(tmp_path / "fixtures", kind)
    stored = load_file(folder / f"{kind}.io.safetensors")
    for name in sorted(stored)[:: max(1, len(stored) // 6)]:
        rest = {key: value for key, value in stored.items() if key != name}
        save_file(rest, str(folder / f"{kind}.io.safetensors"))
        _rehash(folder, f"{kind}.io.safetensors")
        lines = run(folder).lines
        assert (name.removeprefix("out."), False) in {(line.quantity, line.passed) for line in lines}, name


def test_a_quantity_of_another_type_or_shape_fails(copy: Path) -> None:
    _edit(copy, "lg_dd.io.safetensors", lambda t: t.update({"in.noise": t["in.noise"].double()}))
    assert any("F64" in line.note for line in run(copy).lines if line.passed is False)


def test_what_no_check_covers_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], copy: Path
) -> None:
    """No failure, but no silence either: other files, and files without a hash."""
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["other_files"] = {"captions.json": "cleaning of captions"}
    del manifest["files"]["lg_vq.weights.safetensors"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert _status(monkeypatch, copy) == 0
    out = capsys.readouterr().out
    assert "captions.json" in out and "not covered: cleaning of captions" in out
    assert "lg_vq.weights.safetensors" in out and "no hash of it" in out and "2 not covered" in out


def test_a_check_that_breaks_fails_its_fixture_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = _copy_of(tmp_path / "fixtures", "lg_filter", "var_filter")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["fixtures"]["lg_filter"]["cases"] = None
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert _status(monkeypatch, folder) == 1
    assert "TypeError" in capsys.readouterr().out
    assert all(line.passed for line in run(folder).lines if line.fixture == "var_filter")


def test_keys_that_are_not_needed_are_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], copy: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["conformance", str(copy)])
    assert main() == 0
    assert "lg_vq: quantize.codebook_used not needed: a training statistic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("norm.weight"), "missing norm.weight"),
        (lambda t: t.update({"layers.0.gate.weight": torch.zeros(2)}), "unexpected layers.0.gate.weight"),
        (lambda t: t.update({"adapter.weight": torch.zeros(2)}), "unexpected adapter.weight"),
    ],
)
def test_a_missing_or_unexpected_weight_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    copy: Path,
    change: Callable[[dict[str, Tensor]], object],
    said: str,
) -> None:
    _edit(copy, "lg_dd.weights.safetensors", change)
    assert _status(monkeypatch, copy) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lg_dd.weights.safetensors", "var_dd.io.safetensors"])
def test_a_wrong_hash_and_a_missing_file_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], copy: Path, name: str
) -> None:
    """Also of a file that no fixture of the folder uses."""
    with (copy / name).open("ab") as file:
        file.write(b"\0")
    assert _status(monkeypatch, copy) == 1
    assert "SHA-256" in capsys.readouterr().out
    (copy / name).unlink()
    assert _status(monkeypatch, copy) == 1
    assert "not there" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", '{"fixtures": {}}', '{"files": {}}'])
def test_a_folder_without_a_manifest_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    assert _status(monkeypatch, tmp_path) == 1
    assert "manifest.json" in capsys.readouterr().err


def _as_identity(table: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Condition positions turned by nothing, where LlamaGen multiplies them with zero."""

    def changed(cfg: Any) -> Tensor:
        made = table(cfg).clone()
        made[: cfg.prefix, :, 0] = 1
        return made

    return changed


@pytest.mark.parametrize(
    ("module", "name", "wrong", "shown_by"),
    [
        (var, "_NORM_EPS", 1e-5, {"var_teacher", "var_teacher_saln", "var_teacher_nol2", "var_dd"}),
        (var, "student_mask", var.paper_student_mask, {"var_dd", "var_hybrid"}),
        (multiscale_vq, "phi_index", lambda scales, _: (0,) * scales, {"var_vqvae", "var_quant10"}),
        (
            "dd_core.models.llamagen",
            "rope_table",
            _as_identity(layers.rope_table),
            {"lg_gpt_c2i", "lg_gpt_t2i", "lg_dd"},
        ),
    ],
    ids=["epsilon", "student mask", "φ", "rotary condition"],
)
def test_a_wrong_model_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: Any, name: str, wrong: object, shown_by: set[str]
) -> None:
    """Small errors that are easy to make are seen in our own fixtures, which pass without them."""
    folder = _copy_of(tmp_path / "fixtures", *shown_by)
    monkeypatch.setattr(*((f"{module}.{name}", wrong) if isinstance(module, str) else (module, name, wrong)))
    failed = {line.fixture for line in run(folder).lines if line.passed is False}
    assert failed == shown_by
