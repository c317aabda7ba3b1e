"""The folder of multiprocessing's sockets, whose paths have to fit a socket's address."""

from __future__ import annotations

import os
import tempfile
from multiprocessing import util

from dd_core.errors import InvalidRequestError
from server.errors import shortened

_LONGEST = 103  # bytes of a socket's path on macOS; on Linux 107
_ADDED = len("/pymp-12345678/listener-12345678")
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def settle_socket_folder() -> None:
    """Let multiprocessing make its folder: in TMPDIR, or where that is too long, in the first short one.

    It makes one folder and keeps to it, so only the first call in a process has an effect.

    Raises:
        InvalidRequestError: there is no folder to write to whose path is short enough.
    """
    before = tempfile.tempdir
    try:
        usual = tempfile.gettempdir()
        if len(os.fsencode(usual)) + _ADDED > _LONGEST:
            short = next((folder for folder in _SHORT if os.access(folder, os.W_OK | os.X_OK)), None)
            if short is None:
                raise InvalidRequestError(
                    f"the temporary folder's path is too long for a socket: set TMPDIR to one of at most "
                    f"{_LONGEST - _ADDED} bytes, not {shortened(usual)}",
                    param="TMPDIR",
                )
            tempfile.tempdir = short
        util.get_temp_dir()
    except OSError as error:
        raise InvalidRequestError(
            f"there is no temporary folder: set TMPDIR ({error})", param="TMPDIR"
        ) from None
    finally:
        tempfile.tempdir = before
