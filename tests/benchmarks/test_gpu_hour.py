"""The calls for a borrowed GPU: what fails or hangs is passed over, and nothing that was found is lost."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_hour
from benchmarks.gpu_hour import Step, run_call, table


def _python(name: str, code: str, seconds: float = 60.0) -> Step:
    return Step(name, (sys.executable, "-c", code), seconds)


def test_what_fails_or_takes_too_long_is_passed_over_and_filed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "call.json"
    peek = f"print(len(__import__('json').load(open({str(path)!r}))))"
    steps = [
        _python("good", "print('found')"),
        _python("broken", "raise SystemExit('no such kernel')"),
        _python("endless", "import time; print('begun', flush=True); time.sleep(600)", 1.0),
        _python("later", peek),
    ]
    found = run_call(steps, path, 120.0)
    assert [row["good"] for row in found] == [True, False, False, True]
    assert [row["ended"] for row in found][1:3] == ["exit code 1", "ended after 1 s"]
    assert "no such kernel" in found[1]["said"]
    assert found[3]["said"] == "3\n", "each step's findings are there before the next begins"
    assert json.loads(path.read_text(encoding="utf-8")) == found
    lines = table(found).splitlines()
    assert lines[-4:] == [f"| {r['step']} | {r['ended']} | {r['seconds']} |" for r in found], "the table last"


def test_a_step_whose_time_is_over_files_and_leaves_no_process(tmp_path: Path) -> None:
    """A server that it started would keep the GPU beside every later step."""
    inner = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    outer = f"""
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {inner!r}])
print(child.pid, flush=True)
try:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    time.sleep(600)
except KeyboardInterrupt:
    print("filed", flush=True)
"""
    [row] = run_call([_python("endless", outer, 2.0)], tmp_path / "call.json", 60.0)
    pid, filed = row["said"].split()
    assert filed == "filed" and not row["good"]
    stop = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < stop
        time.sleep(0.05)


def test_a_call_ends_with_its_time(tmp_path: Path) -> None:
    steps = [_python("long", "import time; time.sleep(600)"), _python("left out", "print(1)")]
    found = run_call(steps, tmp_path / "call.json", 0.5)
    assert [row["ended"] for row in found] == ["ended after 0 s", "no time left"]


@pytest.mark.parametrize("call", gpu_hour.CALLS)
def test_a_call_fits_into_ten_minutes(call: str) -> None:
    """Nearly: what takes less than its share leaves time to the next."""
    steps = gpu_hour.PLANS[call]("cuda", "out", False)
    assert len({step.name for step in steps}) == len(steps)
    assert sum(step.seconds for step in steps) <= 600
    tiny = gpu_hour.PLANS[call]("cpu", "out", True)
    assert not any("var-dd-d16" in word or "VAR-DD-d16" in word for step in tiny for word in step.command)
