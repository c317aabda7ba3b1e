"""`python -m server` and the console script: either may be started where the extra is not installed."""

from __future__ import annotations

from dd_core.extras import run_command


def main() -> None:
    """The console script."""
    run_command("server.cli", extra="serve", command="dd-server")


if __name__ == "__main__":
    main()
