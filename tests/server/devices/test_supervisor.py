"""What the end of a device process says of the work that it was at."""

from __future__ import annotations

import signal

import pytest

from server.devices.supervisor import described, is_crash


@pytest.mark.parametrize(
    "code", [0, 1, 70, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL]
)
def test_a_process_that_ends_by_itself_crashed(code: int) -> None:
    assert is_crash(code)


@pytest.mark.parametrize(
    "code", [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGRTMIN, 255, None]
)
def test_a_process_that_was_ended_or_whose_end_was_not_seen_did_not_crash(code: int | None) -> None:
    assert not is_crash(code)


def test_an_end_is_described_with_its_origin() -> None:
    assert described(-signal.SIGKILL) == "signal 9, Killed: sent from outside"
    assert described(-signal.SIGSEGV) == "signal 11, Segmentation fault: its own doing"
    assert described(1) == "exit code 1"
