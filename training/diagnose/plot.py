"""The small figure of a diagnosis: accuracy of the student by block, for each step that it jumps from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from training.metrics.lines import line_figure


def accuracy_figure(record: Mapping[str, Any]) -> Figure | None:
    """The figure of a diagnosis as `diagnosis.json` has it; None where it has no student."""
    for finding in record["findings"]:
        if finding["name"] == "positions":
            lines = {
                f"from {step}": [(block, value) for block, value in enumerate(values) if value is not None]
                for step, values in finding["numbers"]["by_block"].items()
            }
            return line_figure(lines, "accuracy on fresh pairs", "block")
    return None
