"""`python -m training` and the console script: either may be started where the extra is not installed."""

from __future__ import annotations

from dd_core.extras import run_command


def main() -> None:
    """The console script."""
    run_command("training.cli", extra="train", command="dd-train")


if __name__ == "__main__":
    main()
