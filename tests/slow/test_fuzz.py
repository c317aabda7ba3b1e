"""Two thousand requests drawn from the OpenAPI document; `tests/server` has the boundary cases."""

from __future__ import annotations

import pytest

from tests.server.fuzzing import fuzz
from tests.server.helpers import Running

SERIES = 2
CASES = 1000  # of each


@pytest.mark.parametrize("number", range(SERIES))
def test_replies_keep_to_the_document(server: Running, caplog: pytest.LogCaptureFixture, number: int) -> None:
    """Most of the time is spent on drawing the cases."""
    seen = fuzz(server, CASES, caplog, number, boundary=False)
    assert sum(seen.values()) >= CASES
    assert sum(count for (_, status), count in seen.items() if status == 200) >= CASES // 10
