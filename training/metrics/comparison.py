"""The table of a bundle's evaluation: our figures, and the paper's beside them where it has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.metrics.paper import Figures
from training.metrics.report import Row, shown, with_spread, write_record

_COLUMNS = (
    "plan",
    "passes",
    "images",
    "FID",
    "KID ·10³",
    "IS",
    "precision",
    "recall",
    "s an image",
    "images/s",
)
_PAPER = ("FID, paper", "IS, paper", "precision, paper", "recall, paper", "s an image, paper")
_NONE = Figures(0, None)


def comparison_table(rows: Sequence[Row], paper: Mapping[str, Figures], notes: Sequence[str]) -> str:
    """The rows as one Markdown table, with `notes` under it.

    Args:
        paper: the paper's figures by plan; their columns are left out where there are none.
    """
    by_clip = any(r.clip_score is not None for r in rows)
    columns = _COLUMNS + (("CLIP score",) if by_clip else ()) + (_PAPER if paper else ())
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in rows:
        cells: list[str] = [
            r.name,
            shown(r.passes, "d"),
            f"{r.images:,} against {f'{r.reference_images:,}' if r.reference_images else 'statistics'}",
            f"{r.fid:.2f}",
            with_spread(r.kid, r.kid_std, 1e3),
            with_spread(r.inception_score, r.inception_score_std),
            shown(r.precision, ".3f"),
            shown(r.recall, ".3f"),
            shown(None if r.ms_per_image is None else r.ms_per_image / 1e3, ".3f"),
            shown(r.images_per_s, ".1f"),
        ]
        cells += [shown(r.clip_score, ".2f")] if by_clip else []
        if paper:
            found = paper.get(r.name, _NONE)
            cells += [
                shown(found.fid, ".2f"),
                shown(found.inception_score, ".1f"),
                shown(found.precision, ".2f"),
                shown(found.recall, ".2f"),
                shown(found.seconds, ".3f"),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    if paper:
        tables = " and ".join(str(number) for number in sorted({f.table for f in paper.values()}))
        notes = [
            *notes,
            f"The paper's figures are those of its Tables {tables} (arXiv 2412.17153), times on an A100.",
        ]
    return "\n".join([*lines, "", " ".join(notes), ""])


def write_comparison(
    rows: Sequence[Row],
    paper: Mapping[str, Figures],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    out: Path,
) -> None:
    """`evaluation.json` (settings, rows and the paper's figures) and `evaluation.md` (the table) in `out`."""
    record = {
        "settings": dict(settings),
        "rows": [asdict(r) for r in rows],
        "paper": {name: asdict(figures) for name, figures in paper.items()},
    }
    write_record(record, comparison_table(rows, paper, notes), out / "evaluation")
