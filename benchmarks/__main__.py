"""`make bench`: the engine, then the server under load, with the options that both have."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import engine, http_load, report


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, also when the first fails; the worse exit code."""
    given = sys.argv[1:] if argv is None else argv
    report.parser("benchmarks", "The engine, then the server.").parse_args(given)
    return max([engine.main(given), http_load.main(given)])


if __name__ == "__main__":
    sys.exit(main())
