"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with one line a row."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    first, *rest = [f"|{'|'.join(row)}|\n" for row in cells]
    return first + "|---" * len(head) + "|\n" + "".join(rest)
