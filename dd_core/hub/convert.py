"""Published checkpoint files → a bundle folder, checked before a byte is written.

    file ─▶ state dict ─▶ our names ─▶ module on meta: every key, every shape ─▶ safetensors

Tensors keep their type and stay in the source file, mapped into memory, until they are written: a
conversion holds no copy of the weights. The folder appears under its name only when it is whole.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dd_core.bundle import save_bundle
from dd_core.errors import InvalidRequestError, ManifestError
from dd_core.flow import FlowSettings
from dd_core.hub.checkpoint import read_checkpoint, state_dict_at
from dd_core.hub.pull import LocalFile
from dd_core.hub.spec import PARTS, ModelSpec, PartName
from dd_core.hub.storage import check_room, exclusive, room_errors
from dd_core.manifest import Manifest, Source, read_manifest
from dd_core.models import adapters
from dd_core.models.build import new_models, on_meta
from dd_core.models.config import MultiScaleConfig, VARConfig
from dd_core.text.config import T5Config

log = logging.getLogger("dd_core.hub")


def convert(spec: ModelSpec, files: Mapping[PartName, LocalFile], target: Path) -> Manifest:
    """Writes the bundle of `spec` to `target`, or leaves the one that is there if it is the same.

    Args:
        files: one for each part of the model.

    Raises:
        InvalidRequestError: a part has no file, or there is something else than a bundle at `target`.
        WeightsError: a file is damaged, holds more than weights, or other tensors than the architecture.
        StorageError: no room.
    """
    missing = [part for part in spec.files if part not in files]
    if missing:
        raise InvalidRequestError(f"{spec.name} needs a file for {', '.join(missing)}", param=missing[0])
    target = target.resolve()
    _check_replaceable(target)
    with exclusive(target.with_name(f".{target.name}.lock")):
        found, sources = _existing(target), [files[part].source for part in spec.files]
        if found is not None and found == _planned(spec, sources, found):
            log.info("%s is up to date", target)
            return found
        modules, spec = _checked(spec, files)
        size = sum(t.nbytes for m in modules.values() if m is not None for t in m.state_dict().values())
        check_room(target, size, f"the bundle of {spec.name}")
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
        try:
            with room_errors(target.parent, "the conversion"):
                made = manifest_of(spec, sources)
                manifest = save_bundle(partial, made, **modules, marginals_KLV=None, dtype=None)
            shutil.rmtree(target, ignore_errors=True)
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _check_replaceable(target: Path) -> None:
    """Refuses to put a bundle in the place of anything but a bundle: what is there will be deleted."""
    if not target.exists():
        return
    foreign = not target.is_dir() or any(
        path.name != "manifest.json" and path.suffix != ".safetensors" for path in target.iterdir()
    )
    if foreign:
        raise InvalidRequestError(f"{target} exists and is no bundle: name another folder", param="to")


def manifest_of(spec: ModelSpec, sources: list[Source]) -> Manifest:
    """The manifest of the bundle of `spec`, before it has files.

    LlamaGen's text models read FLAN-T5-XL, which it names.
    """
    shared = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "files"}
    model = spec.student or spec.teacher
    text = T5Config(length=model.text_tokens, dim=model.text_dim) if model and model.text_dim else None
    return Manifest(**shared, text=text, flow=FlowSettings(), sources=sources)


def _existing(target: Path) -> Manifest | None:
    """The manifest of a bundle that is there and looks whole."""
    with suppress(ManifestError):
        manifest = read_manifest(target)
        sizes = {n: (target / n).stat().st_size for n in manifest.files if (target / n).is_file()}
        if sizes == {name: entry.bytes for name, entry in manifest.files.items()}:
            return manifest
    return None


def _planned(spec: ModelSpec, sources: list[Source], found: Manifest) -> Manifest:
    """The manifest that a conversion would write, but for what only reading the weights can tell."""
    if isinstance(spec.student, VARConfig) and isinstance(found.student, VARConfig):
        spec = replace(spec, student=replace(spec.student, student_mask=found.student.student_mask))
    return manifest_of(spec, sources).model_copy(update={"files": found.files})


def _checked(spec: ModelSpec, files: Mapping[PartName, LocalFile]) -> tuple[dict[str, Any], ModelSpec]:
    """Reads all files and holds them against the architecture; the spec comes back with its mask.

    Returns:
        The modules (None for a part that the model lacks), whose weights are the files' own tensors.
    """
    states = {}
    for part in spec.files:
        states[part], spec = _read(part, spec, files[part].path)
    with on_meta():
        modules = dict(zip(PARTS, new_models(spec.vq, spec.student, spec.teacher), strict=True))
    for part, state in states.items():
        module = modules[part]
        assert module is not None, "a part with a file has an architecture"
        adapters.load_strictly(module, state, str(files[part].path))
    return modules, spec


def _read(part: PartName, spec: ModelSpec, path: Path) -> tuple[dict[str, Tensor], ModelSpec]:
    """A part's tensors under our names; and the spec, with the mask that a VAR student's file brings."""
    # A safetensors file has no levels: it is the state dict.
    places = ((),) if path.suffix == ".safetensors" else spec.files[part].places
    raw, place = state_dict_at(read_checkpoint(path), places, str(path))
    if place != places[0]:
        log.warning(
            "%s: no %s in it; its %s is taken", path, "/".join(places[0]), "/".join(place) or "top level"
        )
    adapted = _adapt(part, spec, raw, str(path))
    if adapted.ignored:
        log.debug("%s: not needed: %s", path, ", ".join(adapted.ignored))
    return adapted.state, _with_mask(spec, raw, adapted) if part == "student" else spec


def _adapt(part: PartName, spec: ModelSpec, raw: Mapping[str, Tensor], source: str) -> adapters.Adapted:
    if spec.family == "llamagen":
        adapt = adapters.adapt_llamagen_vq if part == "tokenizer" else adapters.adapt_llamagen_gpt
    elif part == "tokenizer":
        assert isinstance(spec.vq, MultiScaleConfig)
        return adapters.adapt_var_vqvae(raw, len(spec.vq.channel_multipliers), source)
    else:
        adapt = adapters.adapt_var_dd if part == "student" else adapters.adapt_var
    return adapt(raw, source)


def _with_mask(spec: ModelSpec, raw: Mapping[str, Tensor], adapted: adapters.Adapted) -> ModelSpec:
    """The attention mask that a VAR student's file brings along wins over the released code's."""
    if not isinstance(spec.student, VARConfig):
        return spec
    kind, mask = adapters.student_mask_of(raw, spec.student)
    if kind != "released":
        log.warning("%s: the file's attention mask is not the released code's but %s; it is used", spec.name,
                    {"paper": "the paper's", "checkpoint": "one of its own"}[kind])  # fmt: skip
    if mask is not None:
        adapted.state["mask_SS"] = mask
    changes: dict[str, Any] = {"student_mask": kind}
    return replace(spec, student=replace(spec.student, **changes))
