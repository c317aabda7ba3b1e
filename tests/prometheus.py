"""Prometheus' own tools, where this machine has them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="no Prometheus on this machine (`make prometheus` installs Debian's)",
)


def promtool(*arguments: object, given: str = "") -> str:
    """What `promtool` says of something that it must accept without a remark."""
    done = subprocess.run(
        ["promtool", *map(str, arguments)], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
