"""The name of the CPU that this is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dd_core.runtime import cpu_name


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ("processor\t: 0\nmodel name\t: Ein Prozessor\nMHz\t: 1\n\nmodel name\t: another\n", "Ein Prozessor"),
        ("CPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n", "0x41 0x3 0xd0c"),
    ],
    ids=["x86", "arm"],
)
def test_a_cpu_is_named_as_linux_does(tmp_path: Path, info: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    assert cpu_name(tmp_path / "cpuinfo") == name
    assert cpu_name(tmp_path / "none")
