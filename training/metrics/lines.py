"""Figures of lines with a name each, several runs in one, as SVG or PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

_MOST_POINTS = 500  # of a line: more are not seen
_LONGEST_NAME = 48  # in a legend, which would take the room of the axes


def line_figure(
    lines: Mapping[str, Sequence[tuple[float, float]]], title: str, xlabel: str, *, log: bool = False
) -> Figure:
    """A small figure.

    Args:
        lines: points by name; a name of more than one line is in the legend.
        log: a logarithmic scale of y, where all values are above 0.
    """
    figure = Figure(figsize=(3.9, 2.7), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        shown = points[:: max(1, len(points) // _MOST_POINTS)]
        # A dollar would begin a formula, and a name that begins with _ would be left out of the legend.
        short = name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
        label = "\N{ZERO WIDTH SPACE}" + short.replace("$", r"\$")
        axes.plot([x for x, _ in shown], [y for _, y in shown], linewidth=1.2, label=label)
    axes.set(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)
    if log and all(y > 0 for points in lines.values() for _, y in points):
        axes.set_yscale("log")
    if len(lines) > 1:
        axes.legend(fontsize="small")
    return figure


def as_svg(figure: Figure) -> bytes:
    """The figure as an SVG whose words are text, the same bytes each time."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dd"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
