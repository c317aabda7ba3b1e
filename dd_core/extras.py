"""The installed parts of the package: without extras it is the client alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OURS = {"dd_core", "distilled_decoding", "server", "training"}


def run_command(module: str, *, extra: str, command: str) -> None:
    """Run `main` of a module that needs `extra`.

    Args:
        command: as the message about a missing package names it.

    Raises:
        SystemExit: 2, after that message.
    """
    with needing(extra, command):
        found = importlib.import_module(module)
    found.main()


@contextmanager
def needing(extra: str, command: str) -> Iterator[None]:
    """For the imports of a command: where a package of `extra` is missing, one line says what to install.

    Raises:
        SystemExit: 2, after that line.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _OURS:  # our own mistake
            raise
        sys.stderr.write(
            f"{command}: error: {missing} is not installed, so this command cannot run: "
            f"pip install 'distilled-decoding[{extra}]'\n"
        )
        raise SystemExit(2) from None
