"""A published file becomes a bundle that computes the same, or one clear refusal and nothing on the disk."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dd_core import bundle as bundle_module
from dd_core.bundle import load_bundle
from dd_core.errors import BundleNotFoundError, InvalidRequestError, StorageError
from dd_core.hub.convert import convert
from dd_core.hub.locate import existing, locate
from dd_core.hub.pull import LocalFile
from dd_core.hub.registry import registry
from dd_core.hub.spec import ModelSpec, PartName
from dd_core.hub.storage import models_folder
from dd_core.layout import paper_student_mask, student_mask
from dd_core.manifest import read_manifest
from dd_core.models.config import VARConfig
from dd_core.sampling import Sampler, sample_images
from tests.dd_core.converting import files as files
from tests.dd_core.converting import files_of, replaced
from tests.dd_core.converting import modules as modules
from tests.dd_core.converting import spec as spec
from tests.hub import COMMIT, FakeHub, content_of, publish, random_modules, saved, tiny_spec
from tests.upstream import reference_state

CPU = torch.device("cpu")
KEYS = [(7, 0), (7, 1)]
LABELS = [3, 8]


def _samples(sampler: Sampler, spec: ModelSpec) -> list[Tensor]:
    return [sample_images(sampler, entry.preset().plan, LABELS, KEYS) for entry in spec.presets]


def _original(spec: ModelSpec, modules: dict[PartName, Any]) -> Sampler:
    model = spec.student or spec.teacher
    assert model is not None
    return Sampler(
        model.layout, modules["tokenizer"], modules.get("student"), modules.get("teacher"), draw=spec.draw
    )


@pytest.mark.parametrize(
    "name", ["var-dd-d16", "llamagen-dd-l", "var-d30", "var-d36", "llamagen-3b-384", "llamagen-b-256"]
)
def test_what_is_pulled_converted_and_loaded_draws_the_originals_images(hub: FakeHub, name: str) -> None:
    """The whole way of `dd-server serve NAME`, over HTTP, bit for bit."""
    spec = tiny_spec(name)
    modules = random_modules(spec)
    publish(hub, spec, modules)
    folder = locate(name, known={name: spec})
    assert folder == models_folder() / name
    loaded = load_bundle(folder, CPU)
    for made, expected in zip(
        _samples(loaded.sampler, spec), _samples(_original(spec, modules), spec), strict=True
    ):
        assert torch.equal(made, expected)
    assert [s.revision for s in loaded.manifest.sources] == [COMMIT] * len(spec.files)
    assert [s.repo for s in loaded.manifest.sources] == [f.repo for f in spec.files.values()]
    assert all(preset.published for preset in loaded.presets)
    before = hub.asked.total()
    assert locate(name, known={name: spec}) == folder
    assert hub.asked.total() == before, "a converted model needs no hub"


def test_a_text_model_is_converted_with_its_null_condition(hub: FakeHub) -> None:
    spec = tiny_spec("llamagen-t2i-256")
    modules = random_modules(spec)
    publish(hub, spec, modules)
    loaded = load_bundle(locate(spec.name, known={spec.name: spec}), CPU)
    assert loaded.manifest.reads_text and loaded.manifest.classes == []
    expected = modules["teacher"].state_dict()["cls_embedding.uncond_embedding"]
    teacher: Any = loaded.sampler.teacher
    assert torch.equal(teacher.cls_embedding.uncond_embedding, expected)


def test_types_are_kept_and_the_legacy_format_is_read(
    spec: ModelSpec, modules: dict[PartName, nn.Module], tmp_path: Path
) -> None:
    modules["teacher"].to(torch.bfloat16)
    files = files_of(spec, modules, tmp_path / "files")
    old = saved(content_of(spec, "student", modules["student"]), _use_new_zipfile_serialization=False)
    files = replaced(files, "student", old)
    convert(spec, files, tmp_path / "bundle")
    with safe_open(tmp_path / "bundle" / "teacher.safetensors", "pt") as stored:
        assert {stored.get_tensor(k).dtype for k in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    student = load_file(tmp_path / "bundle" / "student.safetensors")
    assert all(torch.equal(student[k], v) for k, v in modules["student"].state_dict().items())


def test_safetensors_are_read_too(
    spec: ModelSpec,
    modules: dict[PartName, nn.Module],
    files: dict[PartName, LocalFile],
    tmp_path: Path,
) -> None:
    path = tmp_path / "student.safetensors"
    save_file({k: v.contiguous() for k, v in reference_state(modules["student"]).items()}, str(path))
    convert(spec, {**files, "student": LocalFile.by_hand("student", path)}, tmp_path / "bundle")
    made = load_bundle(tmp_path / "bundle", CPU)
    assert torch.equal(_samples(made.sampler, spec)[1], _samples(_original(spec, modules), spec)[1])


@pytest.mark.parametrize("kind", ["released", "paper", "checkpoint", "absent"])
def test_the_files_own_mask_is_used(
    spec: ModelSpec,
    modules: dict[PartName, nn.Module],
    files: dict[PartName, LocalFile],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """The reference would run with the mask in its file, so we do, and say so where it is another."""
    assert isinstance(spec.student, VARConfig)
    layout = spec.student.layout
    own = student_mask(layout)
    own[5, 1] = False
    mask = {"paper": paper_student_mask(layout), "checkpoint": own}.get(kind, student_mask(layout))
    content = content_of(spec, "student", modules["student"])
    state = content["trainer"]["ema_parameters"]
    size = layout.num_tokens + 1
    bias = torch.zeros(1, 1, size, size).masked_fill(~mask, float("-inf"))
    state["attn_bias_for_masking"] = bias
    if kind == "absent":
        del state["attn_bias_for_masking"]
    files = replaced(files, "student", saved(content))
    manifest = convert(spec, files, tmp_path / "bundle")
    assert isinstance(manifest.student, VARConfig)
    assert manifest.student.student_mask == ("released" if kind == "absent" else kind)
    student: Any = load_bundle(tmp_path / "bundle", CPU).sampler.student
    assert torch.equal(student.mask_SS, mask)
    assert ("attention mask" in caplog.text) == (kind in ("paper", "checkpoint"))
    # The next conversion finds the same bundle, though the spec does not know of its mask.
    written = (tmp_path / "bundle" / "manifest.json").stat().st_mtime_ns
    assert convert(spec, files, tmp_path / "bundle") == manifest
    assert (tmp_path / "bundle" / "manifest.json").stat().st_mtime_ns == written


def test_the_mean_weights_are_taken_and_others_only_with_a_warning(
    spec: ModelSpec,
    modules: dict[PartName, nn.Module],
    files: dict[PartName, LocalFile],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = content_of(spec, "student", modules["student"])
    del content["trainer"]["ema_parameters"]
    convert(spec, replaced(files, "student", saved(content)), tmp_path / "bundle")
    assert "no trainer/ema_parameters in it; its trainer/var_wo_ddp is taken" in caplog.text


def test_a_teacher_as_its_own_training_saves_it_is_read(
    spec: ModelSpec, modules: dict[PartName, nn.Module], tmp_path: Path
) -> None:
    """VAR's training nests it, as a student's does; and wrappers for several devices prefix every key."""
    files = files_of(spec, modules, tmp_path / "files")
    state = content_of(spec, "teacher", modules["teacher"])
    for number, content in enumerate(
        (
            {"trainer": {"var_wo_ddp": state}, "epoch": 3},
            {"module." + key: value for key, value in state.items()},
            {"trainer": {"var_wo_ddp": {"module._orig_mod." + key: value for key, value in state.items()}}},
        )
    ):
        given = replaced(files, "teacher", saved(content))
        convert(spec, given, tmp_path / f"bundle-{number}")
        loaded = load_bundle(tmp_path / f"bundle-{number}", CPU)
        for ours, theirs in zip(
            _samples(loaded.sampler, spec), _samples(_original(spec, modules), spec), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_a_full_disk_is_refused_before_and_cleaned_up_after(
    spec: ModelSpec, files: dict[PartName, LocalFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
        with pytest.raises(StorageError, match="needs"):
            convert(spec, files, tmp_path / "bundle")

    def full(_state: dict[str, Tensor], path: str) -> None:
        Path(path).write_bytes(b"half")
        # How safetensors tells it: its own exception, with the system's words.
        raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "save_tensors", full)
        with pytest.raises(StorageError, match="became full"):
            convert(spec, files, tmp_path / "bundle")
    assert not list(tmp_path.glob("*bundle*/"))
    convert(spec, files, tmp_path / "bundle")
    load_bundle(tmp_path / "bundle", CPU)


def test_another_source_or_setting_makes_the_bundle_anew(
    spec: ModelSpec, files: dict[PartName, LocalFile], tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    first = convert(spec, files, target)
    unmasked = convert(spec.with_unmasked_prefix(), files, target)
    assert isinstance(unmasked.teacher, VARConfig) and not unmasked.teacher.prefix_mask
    alone = convert(spec.without_teacher(), files, target)
    assert alone.teacher is None and not (target / "teacher.safetensors").exists()
    assert {p.name for p in alone.presets} == {"dd-1", "dd-2"}
    load_bundle(target, CPU)
    other = files_of(spec, random_modules(spec, seed=1), tmp_path / "others")
    assert convert(spec, other, target).files != first.files
    assert convert(spec, files, target) == first == read_manifest(target)


def test_a_damaged_bundle_is_made_anew(
    spec: ModelSpec, files: dict[PartName, LocalFile], tmp_path: Path
) -> None:
    convert(spec, files, tmp_path / "bundle")
    (tmp_path / "bundle" / "student.safetensors").write_bytes(b"half")
    convert(spec, files, tmp_path / "bundle")
    load_bundle(tmp_path / "bundle", CPU)


@pytest.mark.parametrize("manifest", [None, "{}"])
def test_nothing_but_a_bundle_is_replaced(
    spec: ModelSpec, files: dict[PartName, LocalFile], tmp_path: Path, manifest: str | None
) -> None:
    """Other programs have a manifest.json too."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("precious")
    if manifest is not None:
        (theirs / "manifest.json").write_text(manifest)
    with pytest.raises(InvalidRequestError, match="no bundle"):
        convert(spec, files, theirs)
    with pytest.raises(InvalidRequestError, match="no bundle"):
        convert(spec, files, theirs / "notes.txt")
    assert (theirs / "notes.txt").read_text() == "precious"


def test_every_part_needs_a_file(spec: ModelSpec, files: dict[PartName, LocalFile], tmp_path: Path) -> None:
    del files["teacher"]
    with pytest.raises(InvalidRequestError, match="teacher"):
        convert(spec, files, tmp_path / "bundle")


def test_conversion_holds_no_copy_of_the_weights(
    spec: ModelSpec, files: dict[PartName, LocalFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written lies in the file that was read: its tensors are the mapped ones."""
    seen: list[Tensor] = []
    real = bundle_module.save_tensors
    monkeypatch.setattr(
        bundle_module, "save_tensors", lambda state, path: (seen.extend(state.values()), real(state, path))
    )
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this machine")
    convert(spec, files, tmp_path / "bundle")
    regions = [line.split() for line in maps.read_text().splitlines() if str(tmp_path / "files") in line]
    spans = [tuple(int(x, 16) for x in region[0].split("-")) for region in regions]
    inside = [any(a <= t.data_ptr() < b for a, b in spans) for t in seen]
    assert len(seen) > 100 and all(inside)


def test_the_order_in_which_a_name_is_looked_for(
    hub: FakeHub, spec: ModelSpec, files: dict[PartName, LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built-in, folder, converted, published; an unknown name lists what there is."""
    known = {"cifar10": spec, spec.name: spec}
    assert locate("cifar10", known=known).parent.name == "defaults"
    assert existing(spec.name) is None
    convert(spec, files, models_folder() / spec.name)
    assert locate(spec.name, known=known) == existing(spec.name) == models_folder() / spec.name
    here = Path(shutil.copytree(models_folder() / spec.name, models_folder().parent / "here" / spec.name))
    monkeypatch.chdir(here.parent)
    assert locate(spec.name, known=known) == Path(spec.name)
    assert not hub.asked
    with pytest.raises(BundleNotFoundError, match=r"cifar10.*var-dd-d16.*llamagen-t2i-512"):
        locate("nothing", known=registry())
