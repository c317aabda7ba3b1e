"""What a servable model is on disk: a folder with `manifest.json` and safetensors files.

    manifest.json            architecture, plans with their figures, hashes, data, licence
    tokenizer.safetensors    VQ encoder, codebook, decoder
    student.safetensors      F_θ
    teacher.safetensors      the AR teacher (may be absent: then no plan that needs it)
    marginals.safetensors    log-frequencies [K, L, V] for the baselines (may be absent)

A bundle is untrusted input: the manifest is validated field by field, every file is checked
against its SHA-256 before it is parsed, only safetensors are read, and every key and shape must
be exactly what the architecture needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from dd_core.draw import DrawSettings
from dd_core.errors import BundleNotFoundError, HashMismatchError, ManifestError, WeightsError
from dd_core.flow import FlowSettings
from dd_core.models.config import GPTConfig, VQConfig
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.vq import VQTokenizer
from dd_core.plan import Actor, Draw, Plan, Preset, Segment
from dd_core.sampling import Sampler

FORMAT_VERSION = 1
DEFAULT_BUNDLE = "cifar10"
M = TypeVar("M", bound=nn.Module)
_DEFAULTS = Path(__file__).parent / "defaults"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """One file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(gt=0)


class PresetEntry(_Strict):
    """A plan and what was measured of it; `metrics` always says with how many images."""

    name: str
    segments: list[tuple[Actor, int, int]]
    draw: Draw = "multinomial"
    split: int | None = None
    offered: bool = True
    published: bool = False
    cost: int
    metrics: dict[str, float] = Field(default_factory=dict)

    def preset(self) -> Preset:
        """The entry as the planner wants it.

        Raises:
            InvalidPlanError: segments that are no plan.
        """
        plan = Plan(self.name, tuple(Segment(*s) for s in self.segments), self.draw, self.split)
        return Preset(plan, self.metrics.get("fid"), self.published, self.offered)

    @classmethod
    def of(cls, plan: Plan, *, offered: bool = True, metrics: dict[str, float] | None = None) -> PresetEntry:
        segments = [(s.actor, s.start, s.stop) for s in plan.segments]
        return cls(
            name=plan.name, segments=segments, draw=plan.draw, split=plan.split,
            offered=offered, cost=plan.cost, metrics=metrics or {},
        )  # fmt: skip


class Manifest(_Strict):
    """`manifest.json`. `vq`, `teacher` and `student` are the architectures, as their dataclasses."""

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    family: Literal["llamagen"]
    description: str
    image_size: int = Field(gt=0)
    classes: list[str] = Field(min_length=1)
    vq: VQConfig
    student: GPTConfig
    teacher: GPTConfig | None
    draw: DrawSettings
    flow: FlowSettings
    presets: list[PresetEntry] = Field(min_length=1)
    data: str
    licence: str
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A loaded model: its manifest, the plans that it offers, and what plans run on."""

    manifest: Manifest
    sampler: Sampler
    presets: tuple[Preset, ...]

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of all files: the identity of the weights."""
        joined = "".join(f"{n}:{f.sha256}\n" for n, f in sorted(self.manifest.files.items()))
        return hashlib.sha256(joined.encode()).hexdigest()


def builtin_bundles() -> list[str]:
    """Names of the bundles that ship inside the package."""
    return sorted(p.parent.name for p in _DEFAULTS.glob("*/manifest.json"))


def find_bundle(source: str | Path) -> Path:
    """The folder of a built-in name or of a path.

    Raises:
        BundleNotFoundError: neither; the message lists the built-in names.
    """
    built_in = _DEFAULTS / str(source)
    if str(source) in builtin_bundles():
        return built_in
    if (Path(source) / "manifest.json").is_file():
        return Path(source)
    raise BundleNotFoundError(
        f"no bundle {str(source)!r}: neither a folder with a manifest.json nor one of the built-in "
        f"models ({', '.join(builtin_bundles()) or 'none in this installation'})",
        param="model",
    )


def read_manifest(folder: Path) -> Manifest:
    """Reads and validates `manifest.json`.

    Raises:
        ManifestError: not JSON, another format version, or a field that is wrong (named).
    """
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: {error}", param="manifest") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{path}: format_version is {version!r}, this build reads {FORMAT_VERSION}",
            param="format_version",
        )
    try:
        return Manifest.model_validate(raw)
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(str(p) for p in first["loc"])
        raise ManifestError(f"{path}: {place}: {first['msg']}", param=place or "manifest") from error


def load_bundle(source: str | Path, device: torch.device) -> Bundle:
    """Loads a bundle and checks everything about it; weights become float32 on `device`.

    Raises:
        BundleNotFoundError, ManifestError, HashMismatchError, WeightsError: what is wrong, by name.
    """
    folder = find_bundle(source)
    manifest = read_manifest(folder)
    tokenizer = _load_module(VQTokenizer(manifest.vq), folder, manifest, "tokenizer", device)
    student = _load_module(LlamaGenStudent(manifest.student), folder, manifest, "student", device)
    teacher = None
    if manifest.teacher is not None:
        teacher = _load_module(LlamaGenTeacher(manifest.teacher), folder, manifest, "teacher", device)
    marginals = _load_marginals(folder, manifest, device)
    layout = manifest.student.layout
    sampler = Sampler(layout, tokenizer, student, teacher, marginals, manifest.draw, manifest.flow, device)
    presets = tuple(entry.preset() for entry in manifest.presets)
    for preset in presets:
        if preset.plan.num_blocks != layout.num_blocks:
            raise ManifestError(
                f"{folder}: preset {preset.plan.name} ends at block {preset.plan.num_blocks}, "
                f"the layout has {layout.num_blocks}",
                param="presets",
            )
    if len(manifest.classes) != manifest.student.num_classes:
        raise ManifestError(
            f"{folder}: {len(manifest.classes)} class names for {manifest.student.num_classes} classes",
            param="classes",
        )
    return Bundle(manifest, sampler, presets)


def save_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    tokenizer: VQTokenizer,
    student: LlamaGenStudent,
    teacher: LlamaGenTeacher | None,
    marginals_KLV: Tensor | None,
    dtype: torch.dtype = torch.float16,
) -> Manifest:
    """Writes a bundle; returns the manifest with the files' hashes filled in.

    The manifest is written last, so an interrupted save leaves no folder that looks complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    states: dict[str, Mapping[str, Tensor]] = {
        "tokenizer": tokenizer.state_dict(),
        "student": student.state_dict(),
    }
    if teacher is not None:
        states["teacher"] = teacher.state_dict()
    if marginals_KLV is not None:
        states["marginals"] = {"log_frequency": marginals_KLV}
    files = {}
    for name, state in states.items():
        path = folder / f"{name}.safetensors"
        save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in state.items()}, str(path))
        data = path.read_bytes()
        files[path.name] = FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    complete = manifest.model_copy(update={"files": files})
    write_manifest(folder, complete)
    return complete


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` atomically."""
    temporary = folder / "manifest.json.tmp"
    temporary.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
    temporary.replace(folder / "manifest.json")


def _read_checked(folder: Path, manifest: Manifest, name: str) -> dict[str, Tensor]:
    path, entry = folder / f"{name}.safetensors", manifest.files.get(f"{name}.safetensors")
    if entry is None:
        raise ManifestError(f"{folder}: the manifest names no {path.name}", param=path.name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}", param=path.name) from error
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise HashMismatchError(
            f"{path}: SHA-256 is {found[:12]}… over {len(data)} bytes, the manifest says "
            f"{entry.sha256[:12]}… over {entry.bytes}: the file is truncated, damaged or another one",
            param=path.name,
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file: {error}", param=path.name) from error


def _load_module(module: M, folder: Path, manifest: Manifest, name: str, device: torch.device) -> M:
    state = _read_checked(folder, manifest, name)
    expected = module.state_dict()
    problems = [f"missing {k}" for k in expected if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in expected]
    problems += [
        f"{k} has shape {list(state[k].shape)}, needs {list(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(
            f"{folder / name}.safetensors: {'; '.join(problems[:5])}{more}", param=f"{name}.safetensors"
        )
    module.load_state_dict({k: v.float() for k, v in state.items()})
    return module.to(device).eval().requires_grad_(False)


def _load_marginals(folder: Path, manifest: Manifest, device: torch.device) -> Tensor | None:
    if "marginals.safetensors" not in manifest.files:
        return None
    state = _read_checked(folder, manifest, "marginals")
    cfg = manifest.student
    shape = (cfg.num_classes, cfg.layout.num_tokens, cfg.codebook_size)
    found = state.get("log_frequency")
    if found is None or tuple(found.shape) != shape:
        got = None if found is None else list(found.shape)
        raise WeightsError(
            f"{folder}: marginals need log_frequency of shape {list(shape)}, got {got}",
            param="marginals.safetensors",
        )
    return found.float().to(device)
