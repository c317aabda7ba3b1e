"""Rows on disk: a row that was measured is not measured again, as long as what made it stays the same."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from dd_core.errors import RecipeError
from dd_core.files import replacing
from training.metrics.report import Row

log = logging.getLogger("dd_train")

_Figures = TypeVar("_Figures", dict[str, float], float)


def fingerprint_of(key: dict[str, object]) -> str:
    """SHA-256 over settings."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def measured(path: Path, fingerprint: str) -> Row | None:
    """The row on disk if it is of this fingerprint."""
    saved = _saved(path, fingerprint)
    return Row(**saved["row"]) if saved else None


def once(
    path: Path, fingerprint: str, make: Callable[[], Row], weights: Mapping[str, str] | None = None
) -> Row:
    """The row on disk if it is of this fingerprint, else a new one, which is written.

    Args:
        weights: hashes of the parts that the row is of, which are written beside it.
    """
    saved, parts = _saved(path, fingerprint), dict(weights or {})
    row = Row(**saved["row"]) if saved else make()
    if saved.get("weights") != parts:
        _write(path, {"fingerprint": fingerprint, "weights": parts, "row": asdict(row)})
    if not saved:
        kid = "" if row.kid is None else f", KID {1e3 * row.kid:.2f}·10⁻³"
        log.info("%s: FID %.2f%s (%d images)", row.name, row.fid, kid, row.images)
    return row


def read_rows(folder: Path, weights: Mapping[str, str], plans: Collection[str]) -> list[Row]:
    """The rows that an evaluation of these weights has finished, without those of other plans.

    Raises:
        RecipeError: rows are of other weights, as where a stage was gone on with since; or they cannot be
            compared, since plans were measured by other numbers of images.
    """
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    saved = [s for s in found if s["row"]["kind"] != "plan" or s["row"]["name"] in plans]
    ours = [_among(s.get("weights"), weights, of_plan=s["row"]["kind"] == "plan") for s in saved]
    strange = [s["row"]["name"] for s, known in zip(saved, ours, strict=True) if not known]
    if strange:
        raise RecipeError(
            f"{folder}: the figures of {', '.join(strange)} are of other weights than the run has: evaluate "
            "it again",
            param="out",
        )
    rows = [Row(**s["row"]) for s in saved]
    numbers = {(row.images, row.reference_images): row.name for row in rows if row.kind == "plan"}
    if len(numbers) > 1:
        said = ", ".join(f"{name} {images:,} against {real:,}" for (images, real), name in numbers.items())
        raise RecipeError(
            f"{folder}: plans were measured by unequal numbers of images: {said}; evaluate again", param="out"
        )
    return rows


def figures_once(path: Path, key: dict[str, object], make: Callable[[], _Figures]) -> _Figures:
    """Figures on disk if they are of this key, else new ones, which are written."""
    fingerprint = fingerprint_of(key)
    if saved := _saved(path, fingerprint):
        kept: _Figures = saved["figures"]
        return kept
    figures = make()
    _write(path, {"fingerprint": fingerprint, "figures": figures})
    return figures


def _saved(path: Path, fingerprint: str) -> dict[str, Any]:
    """What is on disk if it is of this fingerprint, else nothing."""
    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return saved if saved.get("fingerprint") == fingerprint else {}


def _write(path: Path, record: Mapping[str, object]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def _among(weights: Mapping[str, str] | None, present: Mapping[str, str], *, of_plan: bool) -> bool:
    """True if all of the weights are present ones. A file that does not say has none; a plan is of some."""
    if weights is None or (of_plan and not weights):
        return False
    return all(present.get(part) == digest for part, digest in weights.items())
