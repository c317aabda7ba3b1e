"""The distribution without extras, installed offline beside httpx2, pydantic and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.server.helpers import PATIENCE, Running

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "16-clients.md").read_text(encoding="utf-8")
COMMANDS: list[str] = re.findall(r"^```\n(pip .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dd_core", "distilled_decoding", "server", "training")
OFFLINE = """
pip() { python -m pip "$1" --quiet --disable-pip-version-check --no-index --no-build-isolation "${@:2}"; }
"""
# A program whose own module has the name of one of our packages.
SERVER_PY = 'NAME = "the module of the user"\n'
PROGRAM = """
import asyncio
import sys

import server
from distilled_decoding import AsyncClient, Client

async def generate(url):
    async with AsyncClient(url) as client:
        return await client.generate(label="ship", seed=7, steps=2)

with Client(sys.argv[1]) as client:
    made = client.generate(label="ship", seed=7, steps=2)
assert asyncio.run(generate(sys.argv[1])).images == made.images
made.images[0].save("ship.png")
print(server.NAME, made.plan)
"""


def _run(command: str, environment: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a bash command in a virtual environment."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**inherited, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def _required(name: str) -> set[str]:
    """A distribution and all that it requires on this machine, by their normalized names."""
    found = {canonicalize_name(name)}
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found |= _required(requirement.name)
    return found


def _copy_of_sources(folder: Path) -> Path:
    """The files that a build reads, since it writes beside them."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def test_the_page_installs_from_a_checkout_and_from_a_wheel() -> None:
    assert [command.split()[:2] for command in COMMANDS] == [["pip", "install"], ["pip", "wheel"]]
    assert "pip install distilled-decoding" not in PAGE, "it is on no index"


@pytest.fixture(scope="module", params=COMMANDS, ids=["checkout", "wheel"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment in which the page's commands ran, with the client's requirements in it before."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    for name in {"pip", "setuptools"} | _required("httpx2") | _required("pydantic"):
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(installed.locate_file(top))))
    ended = _run(OFFLINE + request.param, folder, _copy_of_sources(tmp_path_factory.mktemp("checkout")))
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_client_requires_nothing_else(environment: Path, tmp_path: Path) -> None:
    checked = _run("python -m pip check", environment, tmp_path)
    assert checked.returncode == 0, checked.stdout


def test_the_client_works_beside_a_module_named_server(
    environment: Path, server: Running, tmp_path: Path
) -> None:
    """The user's `server.py` hides our package of the same name: the client does not need it."""
    (tmp_path / "server.py").write_text(SERVER_PY)
    (tmp_path / "main.py").write_text(PROGRAM)
    ended = _run(f"python main.py {server.url}", environment, tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "the module of the user dd-2\n"), ended.stderr
    sent = server.post({"label": "ship", "seed": 7, "steps": 2}, accept="image/png")
    assert (tmp_path / "ship.png").read_bytes() == sent.content


@pytest.mark.parametrize(("command", "extra"), [("dd-server", "serve"), ("dd-train", "train")])
def test_a_command_without_its_extra_says_what_to_install(
    command: str, extra: str, environment: Path, tmp_path: Path
) -> None:
    ended = _run(command, environment, tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    expected = rf"{command}: error: \w+ is not installed.*: pip install 'distilled-decoding\[{extra}\]'\n"
    assert re.fullmatch(expected, ended.stderr)
