"""`dd-train` as it is installed: it may be started where the extra `train` is not."""

from __future__ import annotations

from dd_core.extras import needing


def main() -> None:
    """The console script."""
    with needing("train", "dd-train"):
        from training.__main__ import main as run
    run()
