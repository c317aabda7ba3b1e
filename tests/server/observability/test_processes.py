"""Memory and processor time of processes, as the system says."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from server.observability.processes import ProcessUsage


def samples(usage: ProcessUsage) -> dict[tuple[str, str], float]:
    return {(s.name, s.labels["device"]): s.value for family in usage.collect() for s in family.samples}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc on this system")
def test_a_process_that_lives_is_measured_and_one_that_is_gone_left_out() -> None:
    usage = ProcessUsage()
    usage.pids = lambda: {"cpu:0": os.getpid(), "cpu:1": None, "cpu:2": 2**22 + 1}
    found = samples(usage)
    assert set(found) == {
        ("dd_worker_resident_memory_bytes", "cpu:0"),
        ("dd_worker_cpu_seconds_total", "cpu:0"),
    }
    assert found["dd_worker_cpu_seconds_total", "cpu:0"] == pytest.approx(time.process_time(), abs=0.5)


def test_a_name_may_hold_anything(tmp_path: Path) -> None:
    """As `) 1 2 (` in the middle of the fields."""
    (tmp_path / "7").mkdir()
    fields = " ".join(str(number) for number in range(3, 53))  # the third field and those after it
    (tmp_path / "7" / "stat").write_text(f"7 (a) 1 2 () {fields}", encoding="ascii")
    usage = ProcessUsage(tmp_path)
    usage.pids = lambda: {"cpu:0": 7}
    found = samples(usage)
    assert found["dd_worker_resident_memory_bytes", "cpu:0"] == 24 * os.sysconf("SC_PAGE_SIZE")
    assert found["dd_worker_cpu_seconds_total", "cpu:0"] == (14 + 15) / os.sysconf("SC_CLK_TCK")
