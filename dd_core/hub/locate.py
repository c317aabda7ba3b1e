"""A model's name → the folder of its bundle, fetched and converted when that is what it takes."""

from __future__ import annotations

from pathlib import Path

from dd_core.bundle import find_bundle
from dd_core.errors import BundleNotFoundError
from dd_core.hub.registry import registry
from dd_core.hub.spec import ModelSpec
from dd_core.hub.storage import models_folder


def locate(source: str | Path, *, known: dict[str, ModelSpec] | None = None) -> Path:
    """A built-in model, else a bundle's folder, else a published model.

    A published model that was converted before is taken as it is; else its files are pulled and
    converted, which may be gigabytes.

    Args:
        known: the published models by name; None = all of them.

    Raises:
        BundleNotFoundError: none of these; the message lists the names.
        HubError, StorageError, BundleError: the model could not be had; see `pull` and `convert`.
    """
    known = registry() if known is None else known
    folder = existing(source)
    if folder is not None:
        return folder
    spec = known.get(str(source))
    if spec is None:
        try:
            return find_bundle(source)
        except BundleNotFoundError as error:
            says = f"{error}, nor a published one ({', '.join(known)})"
            raise BundleNotFoundError(says, param="model") from None
    # The hub's library takes half a second to import, which only this needs.
    from dd_core.hub.convert import convert
    from dd_core.hub.pull import pull

    convert(spec, pull(spec.files), models_folder() / spec.name)
    return models_folder() / spec.name


def existing(source: str | Path) -> Path | None:
    """The folder of a model that is on this disk already."""
    try:
        return find_bundle(source)
    except BundleNotFoundError:
        pass
    name = str(source)
    folder = models_folder() / name
    return folder if name in converted() else None


def converted() -> list[str]:
    """Names of the models that were converted on this machine."""
    return sorted(path.parent.name for path in models_folder().glob("*/manifest.json"))
