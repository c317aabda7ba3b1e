"""The folder of multiprocessing's sockets. `tests.server.test_cli` serves with a TMPDIR that is too long."""

from __future__ import annotations

import tempfile

import pytest

from dd_core.errors import InvalidRequestError
from server.devices import sockets
from server.devices.sockets import settle_socket_folder


def test_a_path_that_is_too_long_is_named_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 71)
    monkeypatch.setattr(sockets, "_SHORT", ("/nowhere",))
    with pytest.raises(InvalidRequestError, match="TMPDIR to one of at most 71 bytes, not /xxx"):
        settle_socket_folder()
    assert tempfile.gettempdir() == "/" + "x" * 71, "the rest of the process keeps its own"


def test_no_temporary_folder_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(InvalidRequestError, match="set TMPDIR"):
        settle_socket_folder()
