"""`dd-server` as it is installed: it may be started where the extra `serve` is not."""

from __future__ import annotations

from dd_core.extras import needing


def main() -> None:
    """The console script."""
    with needing("serve", "dd-server"):
        from server.__main__ import main as run
    run()
