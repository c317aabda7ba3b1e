"""What the documentation says exists, and what exists is documented."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from distilled_decoding.contract import (
    DoneEvent,
    GenerateReply,
    GenerateRequest,
    ImageEvent,
    ImageReply,
    Timings,
)
from docs import reference
from server import errors
from server.api.content import parse
from server.api.openai import ImagesReply, ImagesRequest
from server.app import create_app
from server.cli import app as cli
from server.observability.metrics import OUTCOMES, Metrics
from server.settings import ENV_PREFIX, Settings, show

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
COMMANDS = [page for page in PAGES if page.name != "CHANGELOG.md"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _doc(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _rows(text: str) -> list[list[str]]:
    """The cells of every table row, without backticks."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("page", COMMANDS, ids=_name)
def test_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)
    named = {target for part in code for target in re.findall(r"\bmake ([a-z]+)\b", part)}
    assert named <= _make_targets()


def test_every_make_target_is_documented() -> None:
    assert _make_targets() == {
        row[0].removeprefix("make ") for row in _rows(_doc("commands.md")) if row[0].startswith("make ")
    }


@pytest.mark.parametrize("page", reference.PAGES, ids=_name)
def test_generated_tables_are_those_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wanted = reference.filled(text)
    assert text == wanted, (
        f"`make reference` writes the tables of {_name(page)} anew; it should be:\n{wanted}"
    )


def test_every_generated_table_has_its_place() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in reference.PAGES)
    assert Counter(re.findall(r"<!-- generated: (\S+) -->", text)) == dict.fromkeys(reference.TABLES, 1)
    assert text.count("<!-- generated: ") == text.count("<!-- end -->")


def test_the_help_names_every_variable_and_default() -> None:
    text = " ".join(p.help for p in reference.commands_of(cli)["serve"].params)
    for name, field in Settings.model_fields.items():
        assert f"{ENV_PREFIX}{name.upper()}" in text
        if field.default_factory is None:
            assert f"[env: {ENV_PREFIX}{name.upper()}; default: {show(field.default)}]" in text


def test_every_variable_that_is_named_anywhere_exists() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]*[A-Z]\b", text))
    assert named <= {ENV_PREFIX + name.upper() for name in Settings.model_fields}


def test_every_route_is_documented(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-for-the-admin-routes\n")
    app = create_app(Settings(admin_keys_file=keys))
    paths = {
        f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods
    }
    documented = set(re.findall(r"`((?:GET|POST|PUT|DELETE) /[^`]*)`", _doc("02-http-api.md")))
    assert paths <= documented
    pages = {"GET /", "GET /docs", "GET /openapi.json"}
    assert documented - paths == pages


def test_every_request_and_reply_field_is_documented() -> None:
    text = _doc("02-http-api.md")
    models = (
        GenerateRequest,
        GenerateReply,
        ImageReply,
        Timings,
        ImageEvent,
        DoneEvent,
        ImagesRequest,
        ImagesReply,
    )
    for model in models:
        missing = [name for name in model.model_fields if f"`{name}`" not in text]
        assert not missing, model.__name__


def _all_errors(kind: type[errors.ApiError]) -> set[type[errors.ApiError]]:
    return {kind}.union(*(_all_errors(child) for child in kind.__subclasses__()))


def test_every_error_code_is_documented_with_its_status() -> None:
    rows = {(row[1], row[0]) for row in _rows(_doc("02-http-api.md")) if row[0].isdigit()}
    codes = {(e.code, str(e.status)) for e in _all_errors(errors.ApiError) if not e.__name__.startswith("_")}
    assert codes <= rows
    routing = {("not_found", "404"), ("method_not_allowed", "405")}
    assert rows - codes == routing


def _metrics() -> dict[str, list[str]]:
    """Documented names (with `_total`) and labels of what the server itself counts."""
    registered = Metrics().registry.collect()
    names = {}
    for metric in registered:
        if metric.name.startswith("dd_"):
            name = metric.name + ("_total" if metric.type == "counter" else "")
            names[name] = [metric.type]
    return names


def test_every_metric_is_documented_with_its_kind() -> None:
    rows = {row[0]: [row[1]] for row in _rows(_doc("04-metrics.md")) if row[0].startswith("dd_")}
    assert rows == _metrics()


def test_every_outcome_is_documented() -> None:
    rows = [row[0] for row in _rows(_doc("04-metrics.md"))]
    assert set(OUTCOMES) <= set(rows)


@pytest.mark.parametrize("page", COMMANDS, ids=_name)
def test_curl_bodies_are_valid_requests(page: Path) -> None:
    for body in re.findall(r"-d '(\{[^']*\})'", page.read_text(encoding="utf-8")):
        parse(GenerateRequest, body.encode())


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_json_examples_are_json(page: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        json.loads(block)


def _prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them, and the site (`docs/mkdocs/mkdocs.yml`)."""
    headings = re.findall(r"^#{1,6} (.+)$", _prose(page), re.MULTILINE)
    shown = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    return [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in shown]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=_name)
def test_anchors_of_a_page_are_distinct(page: Path) -> None:
    """GitHub and the site number equal ones in different ways."""
    assert max(Counter(_anchors(page)).values()) == 1


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "benchmarks" / "results").rglob("*.md")], ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", _prose(page))
    for link in (first or second for first, second in links):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


def test_pages_that_files_name_exist() -> None:
    """Comments, messages and manifests name pages by their path."""
    roots = ("dd_core", "distilled_decoding", "server", "training", "benchmarks", "deploy", "docker", "tests")
    files = [p for root in roots for p in (ROOT / root).rglob("*") if p.suffix in (".py", ".yaml", ".yml")]
    for file in files:
        named = re.findall(r"docs/((?:\w+/)*[\w-]+\.md)(?:#([\w-]+))?", file.read_text(encoding="utf-8"))
        for name, anchor in named:
            page = ROOT / "docs" / name
            assert page.exists(), f"{_name(file)} names docs/{name}"
            assert not anchor or anchor in _anchors(page), f"{_name(file)} names docs/{name}#{anchor}"
