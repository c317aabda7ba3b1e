"""What overhead and soak reckon with."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from benchmarks import soak
from benchmarks.accounts import cpu_seconds, descendants, resident


def test_processor_time_and_memory_are_those_of_the_process() -> None:
    before = cpu_seconds(os.getpid())
    started = time.process_time()
    while time.process_time() - started < 0.3:
        pass
    assert cpu_seconds(os.getpid()) - before >= 0.25
    held = resident(os.getpid())
    block = bytearray(os.urandom(64 * 2**20))
    assert resident(os.getpid()) - held > 50 * 2**20
    del block


def test_descendants_are_children_and_theirs() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not descendants(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        below = descendants(process.pid)
        assert len(below) == 1 and {process.pid, *below} <= set(descendants(os.getpid()))
        process.communicate(b"\n")


def test_growth_is_the_slope_of_the_second_half() -> None:
    requests = list(range(100, 1100, 100))
    assert soak.growth(requests, [10**9] * 5 + [7 * n for n in requests[5:]]) == pytest.approx(7)
    assert soak.growth(requests, [5 * n for n in requests[:5]] + [10**6] * 5) == pytest.approx(0, abs=1e-6)
