"""A hundred requests drawn from the OpenAPI document; `tests/slow` has the thousands."""

from __future__ import annotations

import pytest

from tests.server.fuzzing import fuzz
from tests.server.helpers import Running


def test_replies_keep_to_the_document(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    seen = fuzz(server, 100, caplog)
    assert sum(seen.values()) >= 100
