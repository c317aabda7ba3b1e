"""The installed parts of the package: without extras it is the client alone."""

from __future__ import annotations

import importlib
import sys

_OURS = {"dd_core", "distilled_decoding", "server", "training"}


def run_command(module: str, *, extra: str, command: str) -> None:
    """Run `main` of a module that needs `extra`; where a package of it is missing, say what to install.

    Args:
        command: as the message about a missing package names it.

    Raises:
        SystemExit: 2, after that message.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _OURS:  # our own mistake
            raise
        sys.stderr.write(
            f"{command}: error: {missing} is not installed, so this command cannot run: "
            f"pip install 'distilled-decoding[{extra}]'\n"
        )
        raise SystemExit(2) from None
    found.main()
