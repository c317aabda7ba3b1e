"""Commands of two ranks on this machine, and one of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

# What follows names the module and its arguments.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")


def said_at_the_end(command: Sequence[str], ready: Callable[[], bool]) -> list[str]:
    """Run ranks, kill the second one once `ready`, and give our own lines of what they said."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as started:
        while not ready():
            assert started.poll() is None, started.stderr and started.stderr.read()
            time.sleep(0.01)
        os.kill(_pid_of_rank(started.pid, 1), signal.SIGKILL)
        said = started.communicate(timeout=60)[1]
    assert started.returncode != 0
    return our_lines(said)


def our_lines(said: str) -> list[str]:
    """Lines of an error, which holds no traceback of ours."""
    assert "in main" not in said.partition("torch/distributed")[0]
    return [line for line in said.splitlines() if "dd-train:" in line]


def _pid_of_rank(launcher: int, rank: int) -> int:
    """The process that torchrun started for a rank."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == launcher and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                    return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")
