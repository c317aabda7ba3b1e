"""Plans of many passes at published sizes can become device graphs, as far as a CPU can tell."""

from __future__ import annotations

import pytest

from benchmarks.naive import SIZES
from tests.dd_core.engine.test_graphable import FEW, plans, stays_on_the_device

MANY = [(name, which) for name in SIZES for which in plans(name) if which not in FEW]


@pytest.mark.parametrize(("name", "which"), MANY)
def test_a_whole_plan_stays_on_the_device(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stays_on_the_device(name, which, monkeypatch)
