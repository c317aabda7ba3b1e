"""A bundle is untrusted input: what is wrong is refused, and named."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dd_core.bundle import Bundle, builtin_bundles, load_bundle
from dd_core.engine.arithmetic import BF16, EXACT32, Arithmetic
from dd_core.engine.prepared import prepare
from dd_core.errors import BundleError, BundleNotFoundError, HashMismatchError, ManifestError, WeightsError
from dd_core.manifest import FileEntry, read_manifest, write_manifest
from dd_core.models.vq import Encoder
from dd_core.plan import one_step, teacher
from dd_core.sampling import sample_images
from tests.tiny_var import tiny_var_bundle

CPU = torch.device("cpu")


@pytest.fixture
def folder(bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


def _rehash(folder: Path, name: str) -> None:
    """Makes the manifest agree with a file, so that the check behind the hash is reached."""
    import hashlib

    manifest, data = read_manifest(folder), (folder / name).read_bytes()
    entry = FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    write_manifest(folder, manifest.model_copy(update={"files": {**manifest.files, name: entry}}))


def _edit(folder: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_what_is_saved_is_what_is_loaded(bundle: Bundle, folder: Path) -> None:
    again = load_bundle(folder, CPU)
    assert again.digest == bundle.digest and again.manifest == bundle.manifest
    pictures = [sample_images(b.sampler, one_step(64), [3], [(1, 0)]) for b in (bundle, again)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("arithmetic", [EXACT32, BF16], ids=lambda a: a.name)
@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_what_is_prepared_while_it_loads_is_what_is_prepared_afterwards(
    folder: Path, tmp_path: Path, family: str, arithmetic: Arithmetic
) -> None:
    """And of the tokenizer's encoder nothing is left, to which VAR's teacher would still hold on."""
    source = folder if family == "llamagen" else tiny_var_bundle(tmp_path / "var")
    reference, before = load_bundle(source, CPU).sampler, _encoders()
    loaded = load_bundle(source, CPU, arithmetic).sampler
    assert _encoders() == before
    blocks = loaded.layout.num_blocks
    for chosen in (one_step(blocks), teacher(blocks)):
        pictures = [sample_images(s, chosen, [3], [(1, 0)]) for s in (loaded, prepare(reference, arithmetic))]
        assert torch.equal(*pictures)


def _encoders() -> int:
    gc.collect()
    return sum(type(found) is Encoder for found in gc.get_objects())


@pytest.mark.parametrize("name", ["tokenizer", "student", "teacher", "marginals"])
def test_a_flipped_bit_and_a_truncated_file_are_refused(folder: Path, name: str) -> None:
    path = folder / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(HashMismatchError, match=path.name):
        load_bundle(folder, CPU)
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(HashMismatchError, match="truncated"):
        load_bundle(folder, CPU)
    path.unlink()
    with pytest.raises(WeightsError, match=path.name):
        load_bundle(folder, CPU)


def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path) -> None:
    path = folder / "student.safetensors"
    state = load_file(path)
    del state["norm.weight"]
    state["n_d_embed.weight"] = torch.zeros(3, 32)
    state["backdoor"] = torch.zeros(1)
    save_file(state, str(path))
    _rehash(folder, path.name)
    with pytest.raises(WeightsError) as caught:
        load_bundle(folder, CPU)
    for part in (
        "missing norm.weight",
        "unexpected backdoor",
        "n_d_embed.weight has shape [3, 32], needs [2, 32]",
    ):
        assert part in caught.value.message


def test_something_else_than_safetensors_is_refused(folder: Path) -> None:
    torch.save({"a": torch.zeros(30_000)}, folder / "teacher.safetensors")
    _rehash(folder, "teacher.safetensors")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_bundle(folder, CPU)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(format_version=99), "format_version"),
        (lambda m: m.update(family="unknown"), "family"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["student"].update(layers="many"), "student.layers"),
        (lambda m: m["presets"][0].update(segments=[["oracle", 0, 64]]), "presets.0.segments"),
        (lambda m: m["draw"].update(top_p=3.0), "draw"),
        (lambda m: m["files"].pop("student.safetensors"), "student.safetensors"),
        (lambda m: m["presets"][0].update(segments=[["student", 0, 32]]), "presets"),
        (lambda m: m["classes"].pop(), "classes"),
    ],
)
def test_a_wrong_manifest_names_the_field(folder: Path, change: Callable[..., object], named: str) -> None:
    _edit(folder, change)
    with pytest.raises(ManifestError) as caught:
        load_bundle(folder, CPU)
    assert named in f"{caught.value.param} {caught.value.message}"


def test_every_error_is_a_bundle_error_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError, match="built-in"):
        load_bundle(tmp_path, CPU)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError):
        load_bundle(tmp_path, CPU)


def test_the_built_in_bundles_load_and_stay_small() -> None:
    """85 MiB in all is the promise of the package."""
    from dd_core.bundle import find_bundle

    names = builtin_bundles()
    assert "cifar10" in names
    size = sum(f.stat().st_size for n in names for f in find_bundle(n).iterdir())
    assert size < 85 * 2**20
    for name in names:
        loaded = load_bundle(name, CPU)
        measured = {p.name: p.metrics.get("fid") for p in loaded.manifest.presets}
        assert all(measured[n] for n in ("dd-1", "dd-2", "teacher")), "a shipped preset has no measured FID"
