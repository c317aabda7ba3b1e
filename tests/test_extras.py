"""What each extra installs is what its part of the code needs; without any, the client works."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from dd_core.extras import needing

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"dd_core", "distilled_decoding", "server", "training"}
# Imported only where they are asked for, with a message of their own that names the extra.
ON_DEMAND = {
    "otel": {"server/observability/tracing.py"},
    "t5": {"dd_core/text/t5.py", "dd_core/text/clean.py"},
}

# A fresh interpreter in which nothing can be imported but what the package installs without extras.
CLIENT_ONLY = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
{code}
"""


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
    """Distributions of other projects that a file imports anywhere in it."""
    tops = {module.partition(".")[0] for module in _modules(ast.parse(path.read_text(encoding="utf-8")))}
    return {_distributions()[top] for top in tops - OURS if top not in sys.stdlib_module_names}


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


def _with_their_own(distributions: set[str]) -> set[str]:
    """Distributions with all that they install in their turn, on whatever system."""
    listed = [text for name in distributions for text in requires(name) or [] if "extra ==" not in text]
    present = set(_distributions().values())
    more = {_name(text) for text in listed} & present
    return distributions if more <= distributions else _with_their_own(distributions | more)


def _client_only(code: str) -> subprocess.CompletedProcess[str]:
    there = _with_their_own(_installed_by(None))
    missing = {top for top, distribution in _distributions().items() if distribution not in there} - OURS
    assert {"torch", "fastapi", "numpy", "typer", "uvicorn"} <= missing
    script = CLIENT_ONLY.format(missing=missing, code=code)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_client_needs_nothing_else() -> None:
    ended = _client_only(
        "from distilled_decoding import AsyncClient, Client; Client().close(); print('made')"
    )
    assert (ended.returncode, ended.stdout) == (0, "made\n"), ended.stderr


@pytest.mark.parametrize(
    ("package", "command", "extra"), [("server", "dd-server", "serve"), ("training", "dd-train", "train")]
)
def test_a_command_without_its_extra_says_what_to_install(package: str, command: str, extra: str) -> None:
    assert PROJECT["scripts"][command] == f"{package}.__main__:main"
    ended = _client_only(f"from {package}.__main__ import main; main()")
    assert (ended.returncode, ended.stdout) == (2, "")
    expected = rf"{command}: error: \w+ is not installed.*: pip install 'distilled-decoding\[{extra}\]'\n"
    assert re.fullmatch(expected, ended.stderr)


def test_a_mistake_of_our_own_is_not_taken_for_a_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"server\.nothing"), needing("serve", "dd-server"):
        raise ModuleNotFoundError("No module named 'server.nothing'", name="server.nothing")


def test_what_serves_installs_the_extra() -> None:
    """A bare package would start neither from `make serve` nor from the image."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = dict(re.findall(r"^EXTRAS_(\w+) = \[(\w+)\]$", makefile, re.MULTILINE))
    assert extras == {name: name for name in ("serve", "train", "dev")}
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert 'pip install ".[serve${EXTRAS:+,$EXTRAS}]"' in dockerfile
