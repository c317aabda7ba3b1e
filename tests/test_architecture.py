"""The shape of the code: who imports whom, how long a file may get, and what is never done."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dd_core", "distilled_decoding", "training", "server")
ALLOWED = {
    "dd_core": {"dd_core"},
    "distilled_decoding": {"distilled_decoding"},
    "training": {"training", "dd_core"},
    "server": {"server", "dd_core", "distilled_decoding"},
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES = 400
# A file is one level above the highest of those that it imports: in all of a package, and within one folder.
MOST_LEVELS = 9
MOST_LEVELS_OF_A_FOLDER = 4


TOP = {
    *(
        "server",
        "dd_core",
        "training",
        "docker",
        "tests",
        "deploy",
        "distilled_decoding",
        "docs",
        "benchmarks",
    ),
    *("pyproject.toml", "README.md", "Makefile", "CHANGELOG.md", "LICENSE", "constraints.txt"),
    *(".ci", ".gitignore", ".dockerignore"),
}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_top_level_is_fixed() -> None:
    """What a command left where it was started is committed with the rest, and nobody looks."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split("/")[0] for line in done.stdout.splitlines()} <= TOP


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere in a file, in functions and strings of importlib too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module or ""
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def test_all_packages_are_looked_at() -> None:
    """The other tests here pass on an empty list; this one does not."""
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_import_direction(path: Path) -> None:
    """server → dd_core ← training, server → distilled_decoding: nothing else, in either direction."""
    package = path.relative_to(ROOT).parts[0]
    ours = {module.partition(".")[0] for module in _imports(_tree(path))} & {*PACKAGES, "tests", "benchmarks"}
    assert ours <= ALLOWED[package]


@pytest.mark.parametrize(
    "path", [p for p in FILES if _name(p).split("/")[0] in ("server", "training")], ids=_name
)
def test_no_model_family_outside_the_core(path: Path) -> None:
    """A model is built by `dd_core.models.build` from its config, and used through the protocols."""
    built = set(_imports(_tree(ROOT / "dd_core" / "models" / "build.py")))
    families = {name for name in built if name.startswith("dd_core.models.")} - {"dd_core.models.config"}
    assert len(families) >= 4
    assert not families & set(_imports(_tree(path)))


def test_the_server_shares_only_the_wire_contract_with_the_client() -> None:
    used = {module for path in (ROOT / "server").rglob("*.py") for module in _imports(_tree(path))}
    assert {name for name in used if name.startswith("distilled_decoding")} == {"distilled_decoding.contract"}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in FILES if path.relative_to(ROOT).parts[0] in ("server", "training")}
FOLDERS = [
    "training.stages",
    *sorted(
        {_module(path.parent) for path in FILES if path.relative_to(ROOT).parts[0] == "server"} - {"server"}
    ),
]


def _imported(module: str) -> set[str]:
    """The files of ours that one imports, wherever in it; `from package import module` is that module."""
    tree = _tree(MODULES[module])
    found = set(_imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found = found - {node.module} | parts if parts else found
    return found & MODULES.keys()


def _levels(modules: set[str]) -> dict[str, int]:
    """The level of each module, by the imports among them alone."""
    levels: dict[str, int] = {}

    def level(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"a circle of imports: {' → '.join([*above, module])}"
        if module not in levels:
            below = (level(name, (*above, module)) for name in _imported(module) & modules)
            levels[module] = 1 + max(below, default=0)
        return levels[module]

    for module in sorted(modules):
        level(module)
    return levels


def _chain(levels: dict[str, int]) -> str:
    """The longest chain of imports, for the message of a failure."""
    chain = [max(levels, key=lambda module: levels[module])]
    while levels[chain[-1]] > 1:
        below = sorted(_imported(chain[-1]) & levels.keys())
        chain.append(next(name for name in below if levels[name] == levels[chain[-1]] - 1))
    return " → ".join(chain)


@pytest.mark.parametrize("package", ["server", "training"])
def test_a_package_has_few_levels(package: str) -> None:
    levels = _levels({module for module in MODULES if module.partition(".")[0] == package})
    assert max(levels.values()) <= MOST_LEVELS, _chain(levels)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_few_levels(folder: str) -> None:
    levels = _levels({module for module in MODULES if module.startswith(f"{folder}.")})
    assert max(levels.values(), default=0) <= MOST_LEVELS_OF_A_FOLDER, _chain(levels)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_file_holds_several_ideas(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_no_test_or_benchmark_is_longer() -> None:
    files = [path for folder in ("tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    long = [_name(path) for path in files if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES]
    assert long == []


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_nothing_loads_code_or_ignores_missing_weights(path: Path) -> None:
    """Weights are data: no pickle, no `weights_only=False`; and none may be missing: no `strict=False`."""
    tree = _tree(path)
    banned = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    assert not {module.partition(".")[0] for module in _imports(tree)} & banned
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value for k in node.keywords}
        called = ast.unparse(node.func)
        if called.endswith("load_state_dict"):
            strict = keywords.get("strict", node.args[1] if len(node.args) > 1 else None)
            assert strict is None or (isinstance(strict, ast.Constant) and strict.value is True), node.lineno
        if called == "torch.load":
            only = keywords.get("weights_only")
            assert isinstance(only, ast.Constant) and only.value is True, (
                f"{_name(path)}:{node.lineno}: torch.load without weights_only=True"
            )


@pytest.mark.parametrize("module", ["plan", "errors"])
def test_plans_need_no_torch(module: str) -> None:
    """Numbers only, down to what they import: a front end may choose a plan without torch."""
    seen: set[str] = set()
    todo = [f"dd_core.{module}"]
    while todo:
        name = todo.pop()
        seen.add(name)
        if name.startswith("dd_core."):
            path = ROOT / (name.replace(".", "/") + ".py")
            todo += [m for m in _imports(_tree(path)) if m not in seen]
    outside = {name.partition(".")[0] for name in seen} - {"dd_core"}
    assert outside <= sys.stdlib_module_names


def test_every_package_is_typed() -> None:
    assert [p for p in PACKAGES if not (ROOT / p / "py.typed").exists()] == []


@pytest.mark.parametrize("path", [p for p in FILES if _name(p).split("/")[0] != "training"], ids=_name)
def test_docstrings_say_what_a_thing_is_or_does(path: Path) -> None:
    """None begins as a riddle: "What …", "Whether …", "Those …"."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(_tree(path)) if isinstance(node, kinds)]
    words = {"What", "Whether", "Those", "How", "All", "Who", "When", "Where", "Why"}
    assert [text for text in found if text and text.split()[0].strip(",:;") in words] == []
