"""Every change of every field of every kind of manifest, and the models that come of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.models.test_untrusted import KINDS, change_manifest


@pytest.mark.parametrize("part", ["both", "student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_manifest_is_refused_by_name_or_serves(kind: str, part: str, tmp_path: Path) -> None:
    change_manifest(kind, part, tmp_path, most=10**9, loaded=20)
