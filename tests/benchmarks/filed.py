"""What a benchmark has filed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def filed(out: Path, theme: str) -> tuple[dict[str, Any], str]:
    """The one record of a theme, and its page."""
    (path,) = (out / theme).glob("*.json")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record, path.with_suffix(".md").read_text(encoding="utf-8")
