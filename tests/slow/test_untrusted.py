"""Every change of every field of every kind of manifest, and the models that come of it.

Of manifests with a student or a teacher alone, whose other fields are the same, it is a share of all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.models.test_untrusted import KINDS, change_manifest


@pytest.mark.parametrize("part", ["both", "student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_manifest_is_refused_by_name_or_serves(kind: str, part: str, tmp_path: Path) -> None:
    change_manifest(kind, part, tmp_path, *((10**9, 20) if part == "both" else (1000, 5)))
