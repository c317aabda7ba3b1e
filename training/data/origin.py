"""The model that a run was started from: what its bundle says about classes, data and licence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dd_core.errors import RecipeError
from dd_core.manifest import Manifest
from training.data.images import About

_FILE = "origin.json"


def write_origin(folder: Path, manifest: Manifest) -> None:
    """Keeps in a run folder what the bundle that the run starts from says about itself."""
    about = About(
        f"Distilled from {manifest.name}: {manifest.description}",
        tuple(manifest.classes),
        manifest.data,
        tuple(manifest.examples),
        manifest.licence,
    )
    (folder / _FILE).write_text(json.dumps(asdict(about), indent=1), encoding="utf-8")


def has_origin(folder: Path) -> bool:
    """True if the run in `folder` was started from a bundle."""
    return (folder / _FILE).exists()


def read_origin(folder: Path) -> About:
    """The description of the model that the run in `folder` was started from.

    Raises:
        RecipeError: the run was not started from a bundle.
    """
    path = folder / _FILE
    if not path.exists():
        raise RecipeError(f"{folder} was not begun with `dd-train start`", param="out")
    found = json.loads(path.read_text(encoding="utf-8"))
    found |= {name: tuple(found[name]) for name in ("classes", "examples")}
    return About(**found)
