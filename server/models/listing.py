"""Fetch, convert and list models for `dd-server`; the work is `dd_core.hub`'s."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dd_core.bundle import builtin_bundles, find_bundle
from dd_core.errors import InvalidRequestError
from dd_core.hub.locate import converted, existing, locate
from dd_core.hub.registry import find_spec, registry
from dd_core.hub.spec import ModelSpec, PartName
from dd_core.hub.storage import gigabytes, models_folder
from dd_core.manifest import Manifest, read_manifest
from server.generation.receipts import Receipt


def pull_lines(name: str, *, no_teacher: bool) -> Iterator[str]:
    """Fetch a published model's files; a line for each, once it is here."""
    from dd_core.hub.pull import pull  # half a second that no other command needs

    spec = _variant(name, no_teacher=no_teacher)
    for part, file in pull(spec.files).items():
        size, source = gigabytes(file.path.stat().st_size), file.source
        yield f"{part}: {source.repo}/{source.file}, {size}, revision {source.revision or 'unknown'}"
        yield f"  {file.path}"


def convert_model(
    name: str,
    by_hand: dict[PartName, Path],
    to: Path | None,
    *,
    no_teacher: bool,
    unmasked_prefix: bool,
) -> str:
    """Make a bundle of files that are given and, for other parts, of the hub's; say where it is.

    Raises:
        InvalidRequestError: a file for a part that the model does not have.
    """
    from dd_core.hub.convert import convert
    from dd_core.hub.pull import LocalFile, pull

    spec = _variant(name, no_teacher=no_teacher, unmasked_prefix=unmasked_prefix)
    unused = [part for part in by_hand if part not in spec.files]
    if unused:
        raise InvalidRequestError(f"{name} takes no {unused[0]} here", param=unused[0])
    files = {part: LocalFile.by_hand(part, path) for part, path in by_hand.items()}
    wanted = {part: file for part, file in spec.files.items() if part not in files}
    if wanted:
        files |= pull(wanted)
    target = models_folder() / spec.name if to is None else to
    manifest = convert(spec, files, target)
    size = gigabytes(sum(entry.bytes for entry in manifest.files.values()))
    return f"{target}: {spec.name}, {size}"


def _variant(name: str, *, no_teacher: bool, unmasked_prefix: bool = False) -> ModelSpec:
    spec = find_spec(name)
    spec = spec.with_unmasked_prefix() if unmasked_prefix else spec
    return spec.without_teacher() if no_teacher else spec


def named_class(receipt: Receipt, source: str | None) -> str | None:
    """Return the name of the class that a receipt is of, if the model with these weights is on this disk.

    Args:
        source: the model; None = a built-in or converted one of the receipt's name.

    Raises:
        BundleError: `source` is no bundle.
    """
    if source is None and receipt.model not in (*builtin_bundles(), *converted()):
        return None
    folder = find_bundle(source) if source is not None else existing(receipt.model)
    assert folder is not None, "it was listed"
    manifest = read_manifest(folder)
    if not isinstance(receipt.condition, int) or receipt.plan not in {p.name for p in manifest.presets}:
        return None
    exists = 0 <= receipt.condition < len(manifest.classes)
    known = exists and receipt.is_of(manifest.identity(receipt.plan))
    return manifest.classes[receipt.condition] if known else None


def listing(source: str | None) -> Iterator[str]:
    """List one model with its plans; or every model: those here with their plans, the others by name."""
    if source is not None:
        spec = registry().get(source) if existing(source) is None else None
        yield from about(read_manifest(locate(source)) if spec is None else spec)
        return
    here = [*builtin_bundles(), *converted()]
    for name in here:
        folder = existing(name)
        assert folder is not None, "it was listed"
        yield from about(read_manifest(folder))
    yield "fetched when first used (`dd-server models NAME` shows one's plans):"
    for name, spec in registry().items():
        if name not in here:
            yield f"  {name:<20} {spec.description}"


def about(model: Manifest | ModelSpec) -> Iterator[str]:
    """Describe a model's plans, what these cost, and the FID that they were measured at."""
    size = model.image_size
    condition = "text" if model.reads_text else f"{len(model.classes)} classes"
    yield f"{model.name}: {model.description}"
    yield f"  {model.family}, {size}x{size} pixels, {condition}"
    for entry in sorted((p for p in model.presets if p.offered), key=lambda p: p.cost):
        fid = f"{entry.metrics['fid']:.2f}" if "fid" in entry.metrics else "not measured"
        note = " (published)" if entry.published else ""
        yield f"  {entry.name:<22} {passes(entry.cost):>18}   FID {fid}{note}"


def passes(cost: int) -> str:
    """A cost in words."""
    return "1 forward pass" if cost == 1 else f"{cost} forward passes"
