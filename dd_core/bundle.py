"""A bundle, which is a servable model on disk: a folder with `manifest.json` and safetensors files.

    manifest.json            architecture, plans with their figures, hashes, data, licence
    tokenizer.safetensors    VQ encoder, codebook, decoder
    student.safetensors      F_θ
    teacher.safetensors      the AR teacher (may be absent: then no plan that needs it)
    marginals.safetensors    log-frequencies [K, L, V] for the baselines (may be absent)
    text.safetensors         the encoder of prompts, and
    tokenizer.json           its word pieces (both absent where classes are the condition, and where the
                             manifest names an encoder on the hub)

A bundle is untrusted input: the manifest is validated field by field, every file is checked
against its SHA-256 before it is parsed, only safetensors are read, and every key and shape must
be exactly what the architecture needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dd_core.engine.arithmetic import Arithmetic
from dd_core.engine.memory import return_freed
from dd_core.engine.prepared import prepare_part, stored_type
from dd_core.errors import (
    BundleNotFoundError,
    HashMismatchError,
    InvalidPlanError,
    ManifestError,
    WeightsError,
    reason,
)
from dd_core.files import save_tensors
from dd_core.manifest import FileEntry, Manifest, read_manifest, write_manifest
from dd_core.models.adapters import check_state, load_strictly
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer, new_models, on_meta, restore
from dd_core.plan import Preset
from dd_core.regular import open_regular, read_regular
from dd_core.sampling import Sampler, check_plan
from dd_core.text.config import T5Config
from dd_core.text.encoder import PromptEncoder
from dd_core.text.minilm import MiniLM, MiniLMStates, packed, read_tokenizer, unpacked
from dd_core.text.t5 import T5States

DEFAULT_BUNDLE = "cifar10"
DEFAULT_TEXT_BUNDLE = "pictograms"
_PIECES = "tokenizer.json"
_SHOWN = 64  # characters of a source that an error repeats
_MOST_PIECES = 2**26  # bytes
_MOST_HEADER = 10**8  # bytes, as safetensors has it
_DEFAULTS = Path(__file__).parent / "defaults"


@dataclass(frozen=True)
class Bundle:
    """A loaded model: its manifest, the plans that it offers, and what plans run on.

    `text` turns prompts into conditions: None for a model of classes, and for one whose manifest
    names no encoder.
    """

    manifest: Manifest
    sampler: Sampler
    presets: tuple[Preset, ...]
    text: PromptEncoder | None = None

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def digest(self) -> str:
        """The identity of the weights."""
        return self.manifest.digest


def builtin_bundles() -> list[str]:
    """Names of the bundles that ship inside the package."""
    return sorted(p.parent.name for p in _DEFAULTS.glob("*/manifest.json"))


def find_bundle(source: str | Path) -> Path:
    """The folder of a built-in name or of a path.

    Raises:
        BundleNotFoundError: neither; the message lists the built-in names.
    """
    built_in, shown = _DEFAULTS / str(source), str(source)[:_SHOWN]
    if str(source) in builtin_bundles():
        return built_in
    try:
        if str(source) and (Path(source) / "manifest.json").is_file():
            return Path(source)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise BundleNotFoundError(f"{shown}: {reason(error)}", param="model") from None
    raise BundleNotFoundError(
        f"no bundle {shown!r}: neither a folder with a manifest.json nor one of the built-in "
        f"models ({', '.join(builtin_bundles()) or 'none in this installation'})",
        param="model",
    )


def load_bundle(source: str | Path, device: torch.device, arithmetic: Arithmetic | None = None) -> Bundle:
    """Loads a bundle and checks everything about it; weights become float32 on `device`.

    Args:
        arithmetic: the models are prepared for inference (`dd_core.engine.prepared`), each before the next
            one is read: so no more than one is ever there in both forms. None = the reference models.

    Raises:
        BundleNotFoundError, ManifestError, HashMismatchError, WeightsError: what is wrong, by name.
    """
    folder = find_bundle(source)
    manifest = read_manifest(folder)
    sampler = _load_models(folder, manifest, device, arithmetic)
    presets = tuple(entry.preset() for entry in manifest.presets)
    for preset in presets:
        try:
            check_plan(sampler, preset.plan)
        except InvalidPlanError as error:
            raise ManifestError(f"{folder}: {error.message}", param="presets") from None
    return Bundle(manifest, sampler, presets, _load_text(folder, manifest, device))


def _load_models(
    folder: Path, manifest: Manifest, device: torch.device, arithmetic: Arithmetic | None
) -> Sampler:
    with on_meta():
        tokenizer, student, teacher = new_models(manifest.vq, manifest.student, manifest.teacher)
    modules = {"tokenizer": tokenizer, "student": student, "teacher": teacher}
    parts = {name: module for name, module in modules.items() if module is not None}
    for name, module in parts.items():  # all of them before the first is read
        _check_size(folder, manifest, name, module)
    sampler = Sampler(
        manifest.model.layout,
        tokenizer,
        student,
        teacher,
        draw=manifest.draw,
        flow=manifest.flow,
        device=device,
    )
    del modules, student, teacher
    for name in list(parts):
        module = parts.pop(name)  # so that none is kept once it is prepared
        _fill(module, _read_checked(folder, manifest, name), folder / name, device, arithmetic)
        if arithmetic is not None:
            sampler = prepare_part(sampler, name, arithmetic, spent=True)
            if module is tokenizer:
                del tokenizer.encoder, tokenizer.decoder  # a teacher still refers to the rest of it
            del module
            return_freed()
    return replace(sampler, marginals_KLV=_load_marginals(folder, manifest, device))


def save_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    tokenizer: AnyTokenizer,
    student: AnyStudent | None,
    teacher: AnyTeacher | None,
    marginals_KLV: Tensor | None,
    dtype: torch.dtype | None = torch.float16,
    text: MiniLM | None = None,
    pieces: bytes = b"",
) -> Manifest:
    """Writes a bundle; returns the manifest with the files' hashes filled in.

    Args:
        dtype: of the stored weights; None = as they are. Then nothing is copied, and weights that are
            mapped from another file are written straight from there.
        text, pieces: the encoder of prompts and its `tokenizer.json`, where the bundle is to hold one.

    The manifest is written last, so an interrupted save leaves no folder that looks complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    modules = {"tokenizer": tokenizer, "student": student, "teacher": teacher}
    states: dict[str, Mapping[str, Tensor]] = {k: m.state_dict() for k, m in modules.items() if m is not None}
    if marginals_KLV is not None:
        states["marginals"] = {"log_frequency": marginals_KLV}
    if text is not None:
        states["text"] = packed(text.state_dict())
    files = {}
    for name, state in states.items():
        path = folder / f"{name}.safetensors"
        save_tensors({k: _stored(v, dtype) for k, v in state.items()}, path)
        files[path.name] = file_entry(path)
    if text is not None:
        (folder / _PIECES).write_bytes(pieces)
        files[_PIECES] = file_entry(folder / _PIECES)
    complete = manifest.model_copy(update={"files": files})
    write_manifest(folder, complete)
    return complete


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach().to("cpu")
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    return value.contiguous()


def file_entry(path: Path) -> FileEntry:
    """Hash and size of a file, read in pieces."""
    with open_regular(path) as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


def _entry(folder: Path, manifest: Manifest, file: str) -> FileEntry:
    entry = manifest.files.get(file)
    if entry is None:
        raise ManifestError(f"{folder}: the manifest names no {file}", param=file)
    return entry


def _check_size(folder: Path, manifest: Manifest, name: str, module: nn.Module) -> None:
    """Hold an architecture against the size of its file, before either costs anything.

    A number takes one to eight bytes.
    """
    file = f"{name}.safetensors"
    size = _entry(folder, manifest, file).bytes
    numbers = sum(value.numel() for value in module.state_dict().values())
    if not numbers <= size <= 8 * numbers + _MOST_HEADER:
        raise WeightsError(
            f"{folder / file}: {size} bytes, and the architecture has {numbers} numbers", param=file
        )


def _checked_path(folder: Path, manifest: Manifest, file: str) -> Path:
    """A file's path, once its hash is found to be right."""
    path, entry = folder / file, _entry(folder, manifest, file)
    try:
        size = path.stat().st_size
        if size > entry.bytes:  # not read to its end: it may have none
            raise HashMismatchError(
                f"{path}: {size} bytes, the manifest says {entry.bytes}: it is another file", param=path.name
            )
        found = file_entry(path)
    except OSError as error:
        raise WeightsError(f"{path}: {reason(error)}", param=path.name) from error
    except ValidationError as error:
        raise HashMismatchError(f"{path} is empty", param=path.name) from error
    if found.sha256 != entry.sha256:
        raise HashMismatchError(
            f"{path}: SHA-256 is {found.sha256[:12]}… over {found.bytes} bytes, the manifest says "
            f"{entry.sha256[:12]}… over {entry.bytes}: the file is truncated, damaged or another one",
            param=path.name,
        )
    return path


def _read_checked(folder: Path, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """A file's tensors, mapped from disk, once its hash is found to be right."""
    path = _checked_path(folder, manifest, f"{name}.safetensors")
    try:
        return load_file(path)
    except Exception as error:  # a header may fail in any way there is
        raise WeightsError(f"{path}: not a safetensors file: {error}", param=path.name) from error


def _fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: Path,
    device: torch.device,
    arithmetic: Arithmetic | None = None,
) -> None:
    """Fills a module that was built on the meta device; its weights become float32 on `device`, or what
    `stored_type` says.
    """
    check_state(module, state, f"{source}.safetensors")  # before anything grows to float32
    path = f"{source}.safetensors"
    state = {k: _moved(v, k, path, device, arithmetic) for k, v in state.items()}
    load_strictly(module, state, f"{source}.safetensors")
    restore(module)
    module.to(device).eval().requires_grad_(False)


def _moved(
    value: Tensor, name: str, path: str, device: torch.device, arithmetic: Arithmetic | None
) -> Tensor:
    if arithmetic is None or arithmetic.weights == torch.float32:
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    dtype = stored_type(name, arithmetic) if value.is_floating_point() else value.dtype
    # Mapped by itself: no page that was read stays in memory because another tensor of the file is needed.
    with safe_open(path, "pt") as file:
        return file.get_tensor(name).to(device, dtype, copy=True)  # type: ignore[no-any-return]


def _load_text(folder: Path, manifest: Manifest, device: torch.device) -> PromptEncoder | None:
    """The encoder of prompts; one on the hub is fetched when the first prompt comes."""
    cfg = manifest.text
    if cfg is None:
        return None
    if isinstance(cfg, T5Config):
        states = T5States(cfg, device)
        return PromptEncoder(states, cfg.length, cfg.dim, load=states.load)
    with on_meta():
        module = MiniLM(cfg)
    _check_size(folder, manifest, "text", module)
    path = _checked_path(folder, manifest, _PIECES)
    try:
        pieces = read_tokenizer(read_regular(path, _MOST_PIECES), cfg, str(path))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}", param=path.name) from None
    state = unpacked(_read_checked(folder, manifest, "text"), f"{folder / 'text'}.safetensors")
    _fill(module, state, folder / "text", device)
    return PromptEncoder(MiniLMStates(module, pieces), cfg.length, cfg.dim)


def _load_marginals(folder: Path, manifest: Manifest, device: torch.device) -> Tensor | None:
    if "marginals.safetensors" not in manifest.files:
        return None
    state = _read_checked(folder, manifest, "marginals")
    cfg = manifest.model
    shape = (cfg.num_classes, cfg.layout.num_tokens, cfg.codebook_size)
    found = state.get("log_frequency")
    if found is None or found.shape != shape or not found.is_floating_point():
        got = None if found is None else list(found.shape)
        raise WeightsError(
            f"{folder}: marginals need log_frequency of shape {list(shape)}, got {got}",
            param="marginals.safetensors",
        )
    return found.float().to(device)
