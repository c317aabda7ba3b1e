"""Manifests by anybody: each field of each kind, changed, is refused by name or gives a model that serves."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import torch

from dd_core.bundle import builtin_bundles, find_bundle, load_bundle
from dd_core.errors import BundleError, DDError, ManifestError
from dd_core.hub.convert import manifest_of
from dd_core.hub.registry import registry
from dd_core.manifest import Manifest, read_manifest
from dd_core.noise import NoiseKey
from dd_core.sampling import sample_images
from server.generation.receipts import Receipt, parse_receipt
from server.models.catalog import ServedModel, find
from tests.mutations import changed, changes
from tests.tiny import tiny_bundle
from tests.tiny_text import tiny_text_bundle
from tests.tiny_var import tiny_var_bundle
from tests.tiny_var_text import tiny_var_text_bundle

CPU = torch.device("cpu")
KINDS: dict[str, Callable[[Path], Path]] = {
    "class": tiny_bundle,
    "text": tiny_text_bundle,
    "var": tiny_var_bundle,
    "var-text": tiny_var_text_bundle,
}
_SKIPPED = frozenset({"training"})  # free notes that nobody reads
_WORDS = frozenset({"description", "examples", "classes", "metrics", "data", "licence"})


def _alone(manifest: dict, part: str) -> dict:  # type: ignore[type-arg]
    """The manifest with only a student, or only a teacher."""
    other = "student" if part == "teacher" else "teacher"
    presets = [p for p in manifest["presets"] if all(s[0] != other for s in p["segments"])]
    return {**manifest, other: None, "presets": presets}


def _serves(folder: Path, manifest: Manifest) -> None:
    """What a server does with a manifest before it has its weights, and for every reply."""
    model = ServedModel.of(folder, manifest)
    entry = orjson.loads(orjson.dumps(model.describe(16, "exact")))
    assert entry["name"] == manifest.name and len(entry["plans"]) == len(manifest.presets)
    assert model.bytes >= 0
    for preset in model.presets:
        name = preset.plan.name
        f"x-dd-plan: {name}".encode("latin-1")
        assert name.isascii() and name.isprintable() and len(name) <= 64
        receipt = Receipt.of(model.name, model.identities[name], 0, name, NoiseKey(1, 0))
        assert parse_receipt(str(receipt)) == receipt


@pytest.mark.parametrize("part", ["both", "student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_manifest_is_refused_by_name_or_serves(kind: str, part: str, tmp_path: Path) -> None:
    """A share of all changes; `tests/slow` makes every one."""
    change_manifest(kind, part, tmp_path, *((200, 4) if part == "both" else (50, 1)))


def change_manifest(kind: str, part: str, to: Path, most: int, loaded: int) -> None:
    """Try at most `most` changes, and load at most so many of the models that are accepted."""
    folder = KINDS[kind](to / "bundle")
    path = folder / "manifest.json"
    original = json.loads(path.read_text())
    original = original if part == "both" else _alone(original, part)
    draw, accepted, refusals = random.Random(f"{kind} {part}"), [], []
    everything = changes(original, _SKIPPED)
    for place, value in draw.sample(everything, min(most, len(everything))):
        manifest = changed(original, place, value)
        path.write_text(json.dumps(manifest))
        try:
            _serves(folder, find(folder).manifest)
        except DDError as error:
            refusals.append((place, error))
        else:
            accepted.append((place, manifest))
    assert [place for place, e in refusals if not e.param or len(e.message.encode()) > 1000] == []
    assert accepted, "nothing but the original is accepted"
    matter = [m for place, m in accepted if place[0] not in _WORDS]
    for manifest in draw.sample(matter, min(len(matter), loaded)):
        path.write_text(json.dumps(manifest))
        try:
            bundle = load_bundle(folder, CPU)
        except BundleError:
            continue
        condition = bundle.text.encode(["a cat"]) if bundle.text is not None else [0]
        plan = min((p.plan for p in bundle.presets), key=lambda plan: plan.cost)
        size = bundle.manifest.image_size
        assert sample_images(bundle.sampler, plan, condition, [(1, 0)]).shape == (1, size, size, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["presets"][0].update(segments=[["teacher", 0, 1_000_000_000]]), "presets.0.segments"),
        (lambda m: m["presets"][0].update(name="dd\r\nx: y"), "presets.0.name"),
        (lambda m: m["presets"][0].update(name="план"), "presets.0.name"),
        (lambda m: m["presets"][0].update(name="x" * 4000), "presets.0.name"),
        (lambda m: m["presets"][0].update(cost=7), "cost is 7"),
        (lambda m: m["presets"][1].update(name=m["presets"][0]["name"]), "presets"),
        (lambda m: m.update(description="\ud800"), "description"),
        (lambda m: m["classes"].__setitem__(3, "\ud800"), "classes.3"),
        (lambda m: m.update(image_size=2**64), "image_size"),
        (lambda m: m.update(image_size=64), "image_size"),
        (lambda m: m["student"].update(grid=10**6), "student.grid"),
        (lambda m: m["student"].update(layers=-1), "student.layers"),
        (lambda m: m["vq"].update(channels=2**64), "vq.channels"),
        (lambda m: m["vq"].update(channels=33), "vq.channels"),
        (lambda m: m["vq"].update(channel_multipliers=[1] * 60), "vq.channel_multipliers"),
        (lambda m: m["student"].update(heads=3), "heads"),
        (lambda m: m["student"].update(codebook_size=65), "codebook_size"),
        (lambda m: m["draw"].update(temperature=float("nan")), "draw.temperature"),
        (lambda m: m["presets"][0]["metrics"].update(fid=float("inf")), "presets.0.metrics.fid"),
    ],
)
def test_a_refusal_names_the_field(tmp_path: Path, change: Callable[[dict], object], named: str) -> None:  # type: ignore[type-arg]
    folder = tiny_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError) as caught:
        find(folder)
    assert named in f"{caught.value.param} {caught.value.message}"
    assert str(folder / "manifest.json") in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{" * 10, "[" * 100_000, '{"a":' * 100_000, "\udcff", "1" * 5000]
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        find(tmp_path)


def test_every_published_and_built_in_model_is_well_within_the_bounds() -> None:
    for spec in registry().values():
        made = manifest_of(spec, [])
        assert Manifest.model_validate(json.loads(json.dumps(made.model_dump(mode="json")))) == made
    for name in builtin_bundles():
        assert read_manifest(find_bundle(name)).name == name
