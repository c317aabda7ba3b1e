"""Published checkpoint files → a bundle folder, checked before a byte is written.

    file ─▶ state dict ─▶ our names ─▶ module on meta: every key, every shape ─▶ safetensors

Tensors keep their type and stay in the source file, mapped into memory, until they are written: a
conversion holds no copy of the weights. The folder appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dd_core.bundle import save_bundle
from dd_core.errors import InvalidRequestError, ManifestError, WeightsError
from dd_core.flow import FlowSettings
from dd_core.hub.checkpoint import read_checkpoint, state_dict_at
from dd_core.hub.pull import PulledFile
from dd_core.hub.spec import ModelSpec, PartName
from dd_core.hub.storage import check_room, exclusive, room_errors
from dd_core.manifest import Manifest, Source, read_manifest
from dd_core.models.adapters import (
    Adapted,
    adapt_llamagen_gpt,
    adapt_llamagen_vq,
    adapt_var,
    adapt_var_dd,
    adapt_var_vqvae,
    load_strictly,
    student_mask_of,
)
from dd_core.models.build import (
    AnyStudent,
    AnyTeacher,
    AnyTokenizer,
    new_student,
    new_teacher,
    new_tokenizer,
    on_meta,
)
from dd_core.models.config import LlamaGenConfig, MultiScaleConfig, VARConfig
from dd_core.text.config import T5Config

log = logging.getLogger("dd_core.hub")


@dataclass(frozen=True)
class LocalFile:
    """A checkpoint on this disk, and what is known of where it came from."""

    path: Path
    source: Source

    @classmethod
    def by_hand(cls, part: PartName, path: Path) -> LocalFile:
        """A file that the user has.

        Raises:
            WeightsError: it cannot be read.
        """
        try:
            with path.open("rb") as data:
                sha256 = hashlib.file_digest(data, "sha256").hexdigest()
        except OSError as error:
            raise WeightsError(f"{path}: {error.strerror or error}", param=part) from error
        return cls(path, Source(part=part, file=path.name, sha256=sha256))

    @classmethod
    def of_hub(cls, part: PartName, pulled: PulledFile) -> LocalFile:
        """A file of the hub."""
        remote = pulled.remote
        source = Source(
            part=part, file=remote.file, sha256=pulled.sha256, repo=remote.repo, revision=pulled.revision
        )
        return cls(pulled.path, source)


@dataclass(frozen=True)
class _Parts:
    """The model on the meta device, its weights being the files' own tensors."""

    tokenizer: AnyTokenizer
    student: AnyStudent | None
    teacher: AnyTeacher | None

    @property
    def nbytes(self) -> int:
        modules = [m for m in (self.tokenizer, self.student, self.teacher) if m is not None]
        return sum(t.nbytes for m in modules for t in m.state_dict().values())


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
        parts, spec = _checked(spec, files)
        check_room(target, parts.nbytes, f"the bundle of {spec.name}")
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
        try:
            with room_errors(target.parent, "the conversion"):
                manifest = save_bundle(
                    partial,
                    manifest_of(spec, sources),
                    tokenizer=parts.tokenizer,
                    student=parts.student,
                    teacher=parts.teacher,
                    marginals_KLV=None,
                    dtype=None,
                )
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
    """The manifest of the bundle of `spec`, before it has files."""
    return Manifest(
        name=spec.name,
        family=spec.family,
        description=spec.description,
        image_size=spec.image_size,
        classes=list(spec.classes),
        vq=spec.vq,
        student=spec.student,
        teacher=spec.teacher,
        text=_encoder_of(spec),
        draw=spec.draw,
        flow=FlowSettings(),
        presets=list(spec.presets),
        data=spec.data,
        licence=spec.licence,
        sources=sources,
    )


def _encoder_of(spec: ModelSpec) -> T5Config | None:
    """FLAN-T5-XL for LlamaGen's text models, named and not copied."""
    model = spec.student or spec.teacher
    if not isinstance(model, LlamaGenConfig) or not model.text_dim:
        return None
    return T5Config(length=model.text_tokens, dim=model.text_dim)


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
    made = manifest_of(spec, sources).model_copy(update={"files": found.files})
    if isinstance(made.student, VARConfig) and isinstance(found.student, VARConfig):
        student = replace(made.student, student_mask=found.student.student_mask)
        made = made.model_copy(update={"student": student})
    return made


def _checked(spec: ModelSpec, files: Mapping[PartName, LocalFile]) -> tuple[_Parts, ModelSpec]:
    """Reads all files and holds them against the architecture; the spec comes back with its mask."""
    with on_meta():
        tokenizer = new_tokenizer(spec.vq)
    _fill(tokenizer, "tokenizer", spec, files)
    student, teacher = None, None
    if spec.student is not None:
        raw, adapted = _read("student", spec, files)
        spec = _with_mask(spec, raw, adapted)
        assert spec.student is not None
        with on_meta():
            student = new_student(spec.student)
        load_strictly(student, adapted.state, str(files["student"].path))
    if spec.teacher is not None:
        with on_meta():
            teacher = new_teacher(spec.teacher, tokenizer)
        _fill(teacher, "teacher", spec, files)
    return _Parts(tokenizer, student, teacher), spec


def _fill(
    module: AnyTokenizer | AnyTeacher, part: PartName, spec: ModelSpec, files: Mapping[PartName, LocalFile]
) -> None:
    _, adapted = _read(part, spec, files)
    load_strictly(module, adapted.state, str(files[part].path))


def _read(
    part: PartName, spec: ModelSpec, files: Mapping[PartName, LocalFile]
) -> tuple[Mapping[str, Tensor], Adapted]:
    """A part's tensors under their published names, and under ours."""
    path = files[part].path
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
    return raw, adapted


def _adapt(part: PartName, spec: ModelSpec, raw: Mapping[str, Tensor], source: str) -> Adapted:
    if spec.family == "llamagen":
        return adapt_llamagen_vq(raw, source) if part == "tokenizer" else adapt_llamagen_gpt(raw, source)
    if part == "tokenizer":
        assert isinstance(spec.vq, MultiScaleConfig)
        return adapt_var_vqvae(raw, len(spec.vq.channel_multipliers), source)
    return adapt_var_dd(raw, source) if part == "student" else adapt_var(raw, source)


def _with_mask(spec: ModelSpec, raw: Mapping[str, Tensor], adapted: Adapted) -> ModelSpec:
    """The attention mask that a VAR student's file brings along wins over the released code's."""
    if not isinstance(spec.student, VARConfig):
        return spec
    kind, mask = student_mask_of(raw, spec.student)
    if kind != "released":
        log.warning("%s: the file's attention mask is not the released code's but %s; it is used", spec.name,
                    {"paper": "the paper's", "checkpoint": "one of its own"}[kind])  # fmt: skip
    if mask is not None:
        adapted.state["mask_SS"] = mask
    changes: dict[str, Any] = {"student_mask": kind}
    return replace(spec, student=replace(spec.student, **changes))
