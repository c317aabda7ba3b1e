"""Caption cleaning against the reference's, case by case."""

from __future__ import annotations

import json
from pathlib import Path

from dd_core.text.clean import clean_caption, clean_once
from tests.conformance.report import Line, Report


def check_captions(path: Path, report: Report) -> None:
    """Every recorded caption must come out letter by letter, after one pass and after both."""
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError) as error:
        report.fail(path.name, "*", f"{type(error).__name__}: {error}")
        return
    if not cases:
        report.fail(path.name, "*", "no cases")
    for quantity, clean in (("cleaned_once", clean_once), ("cleaned", clean_caption)):
        wrong = [c["input"] for c in cases if clean(c["input"]) != c[quantity]]
        note = f"{len(cases)} captions" if not wrong else f"{len(wrong)} differ, first {wrong[0]!r}"
        report.lines.append(Line(path.name, quantity, None, None, not wrong, note))
