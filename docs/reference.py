"""Write the tables of the pages from the code and the built-in models: `make reference`.

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
`tests/test_docs.py` fails where a page differs from what this module would write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import typer
from fastapi import FastAPI
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel

from dd_core.bundle import DEFAULT_BUNDLE, DEFAULT_TEXT_BUNDLE
from distilled_decoding.contract import (
    MAX_SEED_AS_NUMBER,
    GenerateReply,
    GenerateRequest,
    ImageReply,
    Timings,
)
from docs import figures
from docs.tables import table
from server import errors
from server.api.models import admin
from server.api.openai_fields import NO_EFFECT, ImagesRequest
from server.app import create_app
from server.cli import app as server_cli
from server.observability.metrics import Metrics
from server.observability.processes import ProcessUsage
from server.settings import ENV_PREFIX, Settings, show
from training.cli import app as training_cli
from training.diagnose.finding import RULES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Defaults that are computed at the start.
_COMPUTED = {"encode_threads": "cores, at most 16"}
# Errors that have no class of their own, and the one whose class is the base of all.
_ROUTING = {
    ("404", "not_found"): "There is nothing at this path.",
    ("405", "method_not_allowed"): "The path does not take this method.",
    ("500", "internal_error"): "A bug; the log holds the traceback under the request's id.",
}
# Options of every stage of training.
_SHARED = ("--recipe", "--out", "--device", "--set", "--stop-after", "--threads", "--data", "--size")
_PAGES_OF_THE_SERVER = {
    "GET /": "The page to try it on",
    "GET /docs": "The interface, rendered",
    "GET /openapi.json": "The interface for machines",
}


def commands_of(cli: typer.Typer) -> dict[str, Any]:
    """The commands of a program by name."""
    return dict(cast(Any, typer.main.get_command(cli)).commands)


def settings() -> str:
    """Every setting: variable, flag, default, range, meaning."""
    params = commands_of(server_cli)["serve"].params
    flags = {p.name: [*p.opts, *p.secondary_opts] for p in params if p.param_type_name == "option"}
    rows = []
    for name, field in Settings.model_fields.items():
        default = _COMPUTED.get(name) or show(field.default)
        bounds = [str(getattr(m, k)) for k in ("ge", "le") for m in field.metadata if hasattr(m, k)]
        within = " to ".join(bounds) if len(bounds) == 2 else f"from {bounds[0]}" if bounds else "–"
        rows.append(
            [
                f"`{ENV_PREFIX}{name.upper()}`",
                ", ".join(f"`{flag}`" for flag in flags[name]) if name in flags else "the argument",
                default if default == "none" or name in _COMPUTED else f"`{default}`",
                within,
                field.description or "",
            ]
        )
    return table(["variable", "flag", "default", "range", "meaning"], rows)


def metrics() -> str:
    """Every metric of the server's own: name, kind, labels, meaning."""
    rows = []
    for metric in vars(Metrics()).values():
        for family in metric.describe() if isinstance(metric, (ProcessUsage, MetricWrapperBase)) else ():
            name = family.name + ("_total" if family.type == "counter" else "")
            names = cast(Any, metric if isinstance(metric, MetricWrapperBase) else family)._labelnames
            labels = ", ".join(f"`{label}`" for label in names)
            rows.append([f"`{name}`", family.type, labels or "–", family.documentation])
    rows.append(["`dd_build_info`", "gauge", "`version`", "Constant 1, labelled with the version."])
    return table(["metric", "kind", "labels", "meaning"], rows)


def routes() -> str:
    """Every route with its summary, with those of `/admin`, which exist where admin keys are set."""
    with_keys = FastAPI()
    with_keys.include_router(admin)
    paths = create_app(Settings(), served=()).openapi()["paths"] | with_keys.openapi()["paths"]
    rows = [
        [f"`{method.upper()} {path}`", what["summary"]]
        for path, methods in paths.items()
        for method, what in methods.items()
    ]
    rows += [[f"`{path}`", meaning] for path, meaning in _PAGES_OF_THE_SERVER.items()]
    return table(["path", "does"], rows)


def error_codes() -> str:
    """Every status and code, with what it means."""
    rows = {
        (str(kind.status), kind.code): _summary(kind)
        for kind in _kinds(errors.ApiError)
        if not kind.__name__.startswith("_")
    }
    rows |= _ROUTING
    cells = [[status, f"`{code}`", meaning] for (status, code), meaning in sorted(rows.items())]
    return table(["status", "code", "meaning"], cells)


def fields(*models: type[BaseModel]) -> Callable[[], str]:
    """Return a function that makes the table of the fields of JSON objects."""

    def of_models() -> str:
        rows: dict[str, list[str]] = {}
        for model in models:
            schema = model.model_json_schema()["properties"]
            for name, prop in schema.items():
                if prop.get("deprecated"):  # in a table of its own
                    continue
                rows.setdefault(name, [f"`{name}`", _values(prop), prop.get("description", "")])
        return table(["field", "value", "meaning"], list(rows.values()))

    return of_models


def no_effect() -> str:
    """Fields of other servers that are accepted and change nothing, with the reason."""
    rows = [[", ".join(f"`{name}`" for name in names), reason] for reason, names in NO_EFFECT.items()]
    return table(["field", "why"], rows)


def commands(
    cli: typer.Typer, program: str, elsewhere: Sequence[str] = (), shared: Sequence[str] = ()
) -> Callable[[], str]:
    """Return a function that makes the table of a program's commands.

    Args:
        elsewhere: commands whose options another page lists.
        shared: options that the page says of many commands at once.
    """

    def of_program() -> str:
        rows = []
        for name, command in commands_of(cli).items():
            given = [] if name in elsewhere else command.params
            words = [_flag(p) if p.param_type_name == "option" else p.name.upper() for p in given]
            words = [word for word in words if word not in shared]
            does = command.help.split("\n\n")[0].replace("\n", " ")
            rows.append([f"`{program} {name}`", does, f"`{' '.join(words)}`" if words else "–"])
        return table(["command", "does", "arguments and options"], rows)

    return of_program


def _flag(param: Any) -> str:
    return "/".join([*param.opts, *param.secondary_opts])


def diagnosis() -> str:
    """Every limit of a diagnosis, with the advice past it."""
    rows = [[f"`{name}`", f"{r.limit:g}", r.unit, r.bad] for name, r in RULES.items()]
    return table(["finding", "limit", "of", "past it"], rows)


def make_targets() -> str:
    """Every target of the Makefile, with its comment."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r"^([a-z]+):.*?## (.*)$", text, re.MULTILINE)
    return table(["target", "does"], [[f"`make {name}`", meaning] for name, meaning in found])


def _kinds(kind: type[errors.ApiError]) -> Iterator[type[errors.ApiError]]:
    yield kind
    for child in (each for each in kind.__subclasses__() if each.__module__.startswith("server.")):
        yield from _kinds(child)


def _summary(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def _values(schema: dict[str, Any]) -> str:
    """The values that a JSON schema admits, in a few words; the default behind them."""
    kinds = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    text = " or ".join(_kind(each) for each in kinds)
    default = schema.get("default")
    return text if default is None else f"{text}; default `{show(default)}`"


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "type" not in schema:
        return "object"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [
        f"{sign} {'2⁵³ − 1' if schema[key] == MAX_SEED_AS_NUMBER else schema[key]}"
        for key, sign in signs.items()
        if key in schema
    ]
    return " ".join([schema["type"], ", ".join(bounds)]).strip()


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "routes": routes,
    "errors": error_codes,
    "request": fields(GenerateRequest),
    "reply": fields(GenerateReply, ImageReply, Timings),
    "openai-request": fields(ImagesRequest),
    "openai-no-effect": no_effect,
    "dd-server": commands(server_cli, "dd-server", elsewhere=["serve"]),
    "dd-train": commands(training_cli, "dd-train", shared=_SHARED),
    "diagnosis": diagnosis,
    "make": make_targets,
    "cifar": figures.quality(DEFAULT_BUNDLE),
    "cifar-likeness": figures.sameness(DEFAULT_BUNDLE),
    "pictograms": figures.quality(DEFAULT_TEXT_BUNDLE),
    "pictograms-likeness": figures.sameness(DEFAULT_TEXT_BUNDLE),
}


def filled(text: str) -> str:
    """Put the tables into a page.

    Raises:
        KeyError: a marker names no table.
    """
    return _BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[3]}", text)


def main() -> None:
    """Write the tables of all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
