"""Each extra installs what its part of the code imports; no extra, what the client does."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from dd_core.extras import run_command

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"dd_core", "distilled_decoding", "server", "training"}
# Imported only where they are asked for, with a message of their own that names the extra.
ON_DEMAND = {
    "otel": {"server/observability/tracing.py"},
    "t5": {"dd_core/text/t5.py", "dd_core/text/clean.py", "training/metrics/clip.py"},
    "tensorboard": {"training/optim/events.py"},
}


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def _installed_by(extra: str | None) -> set[str]:
    """Distributions that the package installs with an extra, as far as it names them itself."""
    listed = list(PROJECT["dependencies"])
    if extra is not None:
        listed += PROJECT["optional-dependencies"][extra]
    found = set()
    for requirement in listed:
        if _name(requirement) == PROJECT["name"]:
            [extras] = re.findall(r"\[(.*)\]", requirement)
            found |= set().union(*(_installed_by(name) for name in extras.split(",")))
        else:
            found.add(_name(requirement))
    return found


@cache
def _distributions() -> dict[str, str]:
    """The distribution that each top-level module is from."""
    return {top: _name(names[0]) for top, names in packages_distributions().items()}


def _imported(path: Path) -> set[str]:
    """Distributions of other projects that a file imports; one that is not installed goes by the
    name of its module.
    """
    tops = {module.partition(".")[0] for module in _modules(ast.parse(path.read_text(encoding="utf-8")))}
    return {
        _distributions().get(top, _name(top)) for top in tops - OURS if top not in sys.stdlib_module_names
    }


def _modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _part(path: Path) -> str | None:
    """The extra whose code a file is; None is the client's."""
    name = path.relative_to(ROOT).as_posix()
    for extra, files in ON_DEMAND.items():
        if name in files:
            return extra
    if name.startswith("distilled_decoding/"):
        return None
    return "train" if name.startswith("training/") else "serve"


FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_installed(path: Path) -> None:
    needed = _imported(path) - {"pydantic-core"}  # which pydantic pins
    assert needed <= _installed_by(_part(path))


def test_the_client_installs_little() -> None:
    assert _installed_by(None) == {"httpx2", "pydantic"}
    assert "torch" in _installed_by("serve")
    assert _installed_by("serve") < _installed_by("train") < _installed_by("dev")


def test_a_mistake_of_our_own_is_not_taken_for_a_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"server\.nothing"):
        run_command("server.nothing", extra="serve", command="dd-server")


def test_what_serves_installs_the_extra() -> None:
    """A bare package would start neither from `make serve` nor from the image."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = dict(re.findall(r"^EXTRAS_(\w+) = \[(\w+)\]$", makefile, re.MULTILINE))
    assert extras == {name: name for name in ("serve", "train", "dev", "docs")}
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert "for list in serve $(echo \"$EXTRAS\" | tr , ' ')" in dockerfile
