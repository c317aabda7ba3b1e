"""Rows on disk: a row that was measured is not measured again, as long as what made it stays the same."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from dd_core.files import replacing
from training.metrics.report import Row

log = logging.getLogger("dd_train")


def fingerprint_of(key: dict[str, object]) -> str:
    """SHA-256 over settings."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def measured(path: Path, fingerprint: str) -> Row | None:
    """The row on disk if it is of this fingerprint."""
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    return Row(**saved["row"]) if saved["fingerprint"] == fingerprint else None


def once(path: Path, fingerprint: str, make: Callable[[], Row]) -> Row:
    """The row on disk if it is of this fingerprint, else a new one, which is written."""
    if (found := measured(path, fingerprint)) is not None:
        return found
    row = make()
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"fingerprint": fingerprint, "row": asdict(row)}, indent=1))
    kid = "" if row.kid is None else f", KID {1e3 * row.kid:.2f}·10⁻³"
    log.info("%s: FID %.2f%s (%d images)", row.name, row.fid, kid, row.images)
    return row
