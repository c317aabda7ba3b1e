"""`dd-train report`: runs side by side on one page of HTML that needs nothing else.

    folders ─▶ RunRecord each ─▶ tables, curves as SVG, pictures as PNG ─▶ page.html filled in

Jinja2 escapes every name, and the page's policy forbids all that is not in it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from dd_core.files import replacing
from training.diagnose.plot import accuracy_figure
from training.metrics.lines import as_svg, line_figure
from training.optim.progress import figures_of
from training.report.folder import STAGES, RunRecord, read_runs
from training.report.progress import progress_cells

# Figures of an evaluation's rows: title, key, and how it is written; the first is compared.
_FIGURES = (
    ("FID", "fid", "{:.2f}"),
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("class accuracy", "class_accuracy", "{:.3f}"),
    ("right caption", "right_caption", "{:.3f}"),
    ("ms an image", "ms_per_image", "{:.1f}"),
    ("images", "images", "{:,}"),
)


def write_report(folders: list[Path], to: Path) -> None:
    """Write the page.

    Raises:
        RecipeError: one of the folders is no run, or is named twice.
    """
    runs = read_runs(folders)
    environment = Environment(
        loader=PackageLoader("training.report", "."), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("page.html").render(
        runs=runs,
        progress=[(stage, [progress_cells(run, stage) for run in runs]) for stage in STAGES],
        evaluation=_evaluation(runs),
        differences=_differences(runs),
        curves=[(stage, list(_curves(runs, stage))) for stage in STAGES],
        positions=list(_positions(runs)),
        pictures=list(_pictures(runs)),
    )
    with replacing(to) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _evaluation(runs: Sequence[RunRecord]) -> list[tuple[str, list[tuple[str, list[str], int | None]]]]:
    """For each figure that a run has: rows of a plan, each run's value, and the place of the lowest FID."""
    names = list(dict.fromkeys(row["name"] for run in runs for row in run.rows))
    by_name = [{row["name"]: row for row in run.rows} for run in runs]
    tables = []
    for title, key, form in _FIGURES:
        rows = []
        for name in names:
            values = [rows_of.get(name, {}).get(key) for rows_of in by_name]
            known = [value for value in values if value is not None]
            if known:
                best = values.index(min(known)) if key == "fid" and len(known) > 1 else None
                cells = ["–" if value is None else form.format(value) for value in values]
                rows.append((name, cells, best))
        if rows:
            tables.append((title, rows))
    return tables


def _differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Fields of the recipes that are not the same in all runs, with each run's value."""
    settings = [run.settings() for run in runs]
    fields = dict.fromkeys(field for each in settings for field in each)
    rows = [(field, [each.get(field, "–") for each in settings]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def _curves(runs: Sequence[RunRecord], stage: str) -> Iterator[tuple[str, str]]:
    """A figure for each number that the stage logs, with all runs in it: its title and its image."""
    journals = {run.name: figures_of(run.journals[stage]) for run in runs if stage in run.journals}
    names = dict.fromkeys(k for lines in journals.values() for line in lines for k in line)
    for figure in (name for name in names if name != "step"):
        lines = {
            run: [(line["step"], line[figure]) for line in journal if figure in line]
            for run, journal in journals.items()
        }
        drawn = line_figure({k: v for k, v in lines.items() if v}, figure, "step", log=True)
        yield f"{stage}: {figure}", _embedded(as_svg(drawn), "svg+xml")


def _positions(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """Accuracy by block of each run that has a diagnosis of its student."""
    for run in runs:
        figure = accuracy_figure(run.diagnosis) if run.diagnosis else None
        if figure is not None:
            yield run.name, _embedded(as_svg(figure), "svg+xml")


def _pictures(runs: Sequence[RunRecord]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each picture that a run has, beside those of the others."""
    for part in dict.fromkeys(part for run in runs for part in run.pictures):
        shown = [(run.name, run.pictures[part]) for run in runs if part in run.pictures]
        yield part, [(name, _embedded(path.read_bytes(), "png")) for name, path in shown]


def _embedded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
