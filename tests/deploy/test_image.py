"""What the image installs: by hash, in the versions of constraints.txt, and no more than the server needs."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LISTS = ROOT / "docker" / "requirements"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
EXTRAS = ("otel", "t5", "tensorboard", "train")
MACHINE = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}


def _pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def _listed(name: str) -> dict[str, str]:
    return _pins((LISTS / f"{name}.txt").read_text(encoding="ascii"))


def _needed(extra: str) -> set[str]:
    """The packages that an extra of ours needs, by the metadata of those that are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = project["optional-dependencies"]
    waiting = [*map(Requirement, [*project["dependencies"], *ours[extra]])]
    seen: set[tuple[str, str]] = set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        for chosen in ("", *one.extras):
            if (name, chosen) in seen:
                continue
            seen.add((name, chosen))
            if name == project["name"]:
                waiting += map(Requirement, ours.get(chosen, ()))
                continue
            further = map(Requirement, requires(name) or ())
            context = {**MACHINE, "extra": chosen, "python_version": "3.11", "python_full_version": "3.11.16"}
            waiting += [each for each in further if each.marker is None or each.marker.evaluate(context)]
    return {name for name, _ in seen} - {project["name"]}


@pytest.mark.parametrize("path", sorted(LISTS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_file_is_named_by_its_hash(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[\w.-]+==[\w.+]+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry


def test_versions_are_those_of_the_constraints() -> None:
    pinned = _pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    for name in ("serve", *EXTRAS):
        assert _listed(name).items() <= pinned.items()
    assert _listed("cuda")["torch"] == pinned["torch"]
    assert _listed("cpu") == {"torch": f"{pinned['torch']}+cpu"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_lists_hold_what_the_extras_need(extra: str) -> None:
    """But setuptools, with which PyTorch would compile extensions, and CUDA, which CPU builds do without."""
    served = set(_listed("serve"))
    assert served == _needed("serve") - {"torch", "setuptools"} - set(_listed("cuda"))
    more = set(_listed(extra))
    assert not more & served
    assert more == _needed(extra) - _needed("serve")


def test_nothing_is_installed_without_its_hash() -> None:
    folded = DOCKERFILE.replace("\\\n", " ")
    installs = re.findall(r"pip[^\n&]* install [^\n&\"]*", folded)
    assert len(installs) == 3
    assert all("--require-hashes --no-deps" in line or "--no-index /wheels/" in line for line in installs)
    used = set(re.findall(r"docker/requirements/(\w+)\.txt", DOCKERFILE))
    assert used | {"serve", *EXTRAS} == {path.stem for path in LISTS.glob("*.txt")}


def test_the_base_is_named_by_its_digest() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", bases[0])
    assert bases[1:] == ["base", "base"]


def test_the_labels_are_those_of_the_open_container_initiative() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.([a-z.]+)="([^"]*)"', DOCKERFILE))
    assert labels.keys() == {
        *("title", "description", "licenses", "base.name", "version", "revision", "created"),
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (labels["title"], labels["licenses"]) == (project["name"], project["license"])
    for name in ("version", "revision", "created"):
        assert labels[name] == f"${name.upper()}"
        assert f"ARG {name.upper()}=" in DOCKERFILE
