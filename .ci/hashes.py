"""Write docker/requirements/: what the image installs, with the hashes of the files that pip may take.

`python .ci/hashes.py UV`, by `make hashes`. Versions are those of constraints.txt; files are those of CPython
3.11 on Linux, x86-64 and arm64. PyTorch is in cuda.txt, with the libraries that its usual build asks for, and
by hand in cpu.txt, since its CPU builds have an index of their own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docker" / "requirements"
EXTRAS = ("otel", "t5", "tensorboard", "train")
# The build stage's: of the first the package is built, the second writes the bill of materials.
_BUILD = ("setuptools", "cyclonedx-bom==7.5.0")
# PyTorch asks for it, to compile extensions: the server has none.
_LEFT_OUT = "setuptools"
_PYTHON = (3, 11)
_MACHINES = ("x86_64", "aarch64")
_GLIBC = 36  # of Debian 12: 2.36


def _accepted() -> frozenset[Tag]:
    """The tags of wheels that the image can install."""
    platforms = [
        name
        for machine in _MACHINES
        for name in (
            *(f"manylinux_2_{minor}_{machine}" for minor in range(5, _GLIBC + 1)),
            *(f"manylinux{year}_{machine}" for year in ("1", "2010", "2014")),
            f"linux_{machine}",
        )
    ]
    return frozenset(
        [*cpython_tags(_PYTHON, platforms=platforms), *compatible_tags(_PYTHON, "cp311", platforms)]
    )


def _wanted(marker: str | None) -> bool:
    """False for what other systems alone install."""
    found = {
        marker is None
        or Marker(marker).evaluate(
            {
                "sys_platform": "linux",
                "platform_system": "Linux",
                "platform_machine": machine,
                "python_version": "3.11",
                "python_full_version": "3.11.16",
            }
        )
        for machine in _MACHINES
    }
    assert len(found) == 1, f"one list of packages is not enough for all machines: {marker}"
    return found.pop()


def resolve(uv: str, wanted: Iterable[str], extra: str | None = None) -> dict[str, str]:
    """The lines of a requirements file by package: of `wanted`, or of an extra of ours."""
    with tempfile.TemporaryDirectory() as scratch:
        source, lock = Path(scratch) / "wanted.in", Path(scratch) / "pylock.toml"
        source.write_text("\n".join(wanted), encoding="ascii")
        given = [str(source)] if extra is None else ["--extra", extra, "pyproject.toml"]
        options = [
            "--quiet",
            "--universal",
            "--no-config",
            "--python-version",
            "3.11",
            "--output-file",
            str(lock),
        ]
        command = [uv, "pip", "compile", *options, "--constraint", "constraints.txt", *given]
        subprocess.run(command, check=True, cwd=ROOT)
        packages = tomllib.loads(lock.read_text(encoding="utf-8"))["packages"]
    accepted = _accepted()
    lines = {}
    for package in packages:
        hashes = sorted(
            wheel["hashes"]["sha256"]
            for wheel in package.get("wheels", ())
            if parse_wheel_filename(wheel["url"].rpartition("/")[2])[3] & accepted
        )
        if not _wanted(package.get("marker")):
            continue
        pin = f"{package['name']}=={package['version']}"
        lines[package["name"]] = " \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in hashes)])
    return lines


def main(uv: str) -> None:
    serve = resolve(uv, (), "serve")
    cuda = {name for name in serve if name.startswith(("nvidia-", "cuda-")) or name in ("torch", "triton")}
    files = {"serve": serve.keys() - cuda, "cuda": cuda}
    lines = dict(serve)
    for extra in EXTRAS:
        found = resolve(uv, (), extra)
        files[extra] = found.keys() - serve.keys()
        lines |= found
    for name, names in files.items():
        _write(name, [lines[each] for each in sorted(names - {_LEFT_OUT})])
    _write("build", list(resolve(uv, _BUILD).values()))


def _write(name: str, lines: list[str]) -> None:
    text = "\n".join(["# Written by `make hashes` from constraints.txt.", *lines, ""])
    (FOLDER / f"{name}.txt").write_text(text, encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1])
