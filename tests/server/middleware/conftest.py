"""A server that has to be as before after each test of abuse."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from tests.server.helpers import OK, Running, eventually


def gauge(live: Running, name: str) -> float:
    """A number of `/metrics`."""
    found = re.search(rf"^{name} (\S+)$", live.client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.fixture
def abused(server: Running, caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    """A server that must be as before when the test is over: it answers, nothing is left over, no error
    was logged.
    """
    yield server
    assert server.post(OK).status_code == 200
    eventually(lambda: gauge(server, "dd_inflight_requests") == 0, "no request is left over")
    eventually(lambda: gauge(server, "dd_queue_depth") == 0, "no image is left over")
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    assert [r.getMessage() for r in records if r.levelno >= logging.ERROR] == []
    assert "Traceback" not in caplog.text
