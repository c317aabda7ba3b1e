"""`make bench`: the engine, then the server under load, with what both have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import engine, http_load, report

# As small as it gets: shows that the benchmarks work, and nothing of the machine.
_SMOKE_ENGINE = ("--batches", "1,2", "--repeats", "2")
_SMOKE_LOAD = ("--concurrency", "1,2", "--requests", "10", "--rounds", "1")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both, also when the first fails; the worse exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks", description="The engine, then the server.")
    report.bundle_option(parser)
    report.common_options(parser)
    parser.add_argument("--smoke", action="store_true", help="a run that checks the benchmarks themselves")
    chosen = parser.parse_args(argv)
    common = ["--bundle", chosen.bundle, "--device", chosen.device, "--out", str(chosen.out)]
    common += ["--threads", str(chosen.threads)] if chosen.threads else []
    codes = [
        engine.main([*common, *(_SMOKE_ENGINE if chosen.smoke else ())]),
        http_load.main([*common, *(_SMOKE_LOAD if chosen.smoke else ())]),
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
