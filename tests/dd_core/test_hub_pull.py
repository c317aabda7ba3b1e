"""Files come whole, once, and a failure says what to do."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import BinaryIO

import pytest
from huggingface_hub import constants

from dd_core.errors import (
    HashMismatchError,
    HubAccessError,
    HubFileMissingError,
    HubUnreachableError,
    StorageError,
)
from dd_core.hub import pull as pull_module
from dd_core.hub.pull import LocalFile, pull
from dd_core.hub.spec import RemoteFile
from tests.hub import COMMIT, FakeHub
from tests.hub_fixtures import point_at

ROOT = Path(__file__).parent.parent.parent
REMOTE = RemoteFile("owner/name", "folder/weights.pt")
KEY = "owner/name/folder/weights.pt"
BODY = hashlib.shake_256(b"weights").digest(300_000)


@pytest.fixture(autouse=True)
def _one_file(hub: FakeHub) -> None:
    hub.files[KEY] = BODY


def _pull() -> LocalFile:
    return pull({"teacher": REMOTE})["teacher"]


def test_a_file_comes_once_and_says_where_it_is_from(hub: FakeHub) -> None:
    first, second = _pull(), _pull()
    assert first == second
    assert first.path.read_bytes() == BODY
    assert (first.source.revision, first.source.sha256) == (COMMIT, hashlib.sha256(BODY).hexdigest())
    assert hub.asked[f"GET {KEY}"] == 1


def test_a_transfer_that_breaks_off_goes_on_by_itself(hub: FakeHub) -> None:
    hub.cut_after = [100_000]
    assert _pull().path.read_bytes() == BODY
    assert hub.ranges == ["bytes=100000-"]


def test_a_new_process_goes_on_where_the_last_one_was_killed(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself would begin anew: hours, for the largest models on a slow line."""

    def killed(_url: str, out: BinaryIO, **_: object) -> None:
        out.write(BODY[:200_000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pull_module, "http_get", killed)
        with pytest.raises(KeyboardInterrupt):
            _pull()
    assert _pull().path.read_bytes() == BODY
    assert hub.ranges == ["bytes=200000-"] and hub.sent == 100_000


def test_a_file_that_never_ends_is_kept_for_the_next_try(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.cut_after = [1000] + [0] * 9
    with pytest.raises(HubUnreachableError, match="go on where it ended"):
        _pull()
    hub.cut_after = []
    assert _pull().path.read_bytes() == BODY
    assert hub.ranges[-1] == "bytes=1000-"


def test_damage_on_the_way_is_found_and_not_kept(hub: FakeHub) -> None:
    hub.damage = True
    with pytest.raises(HashMismatchError, match=REMOTE.file):
        _pull()
    hub.damage = False
    assert _pull().path.read_bytes() == BODY


def test_damage_in_the_cache_is_found(hub: FakeHub) -> None:
    blob = _pull().path.resolve()
    blob.write_bytes(BODY[:-1])
    with pytest.raises(HashMismatchError, match="run the command again"):
        _pull()
    assert _pull().path.read_bytes() == BODY


def test_an_unreachable_hub_says_how_to_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_at(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(HubUnreachableError, match="dd-server convert"):
            _pull()


def test_what_is_cached_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _pull()
    point_at(monkeypatch, "http://127.0.0.1:9")
    assert _pull() == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert _pull() == first


def test_offline_and_not_cached_names_the_file(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match=f"HF_HUB_OFFLINE.*{KEY}"):
        _pull()
    assert not hub.asked


def test_a_token_is_asked_for_and_sent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(HubAccessError, match="HF_TOKEN"):
        _pull()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert _pull().path.read_bytes() == BODY


def test_a_token_may_be_in_a_file(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `HF_TOKEN_PATH` names it in deploy/kubernetes/components/model-cache."""
    hub.token = "hf_secret"
    (tmp_path / "token").write_text(hub.token + "\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert _pull().path.read_bytes() == BODY


@pytest.mark.parametrize(
    ("remote", "says"),
    [
        (RemoteFile("nobody/nothing", "weights.pt"), "no repository nobody/nothing"),
        (RemoteFile("owner/name", "other.pt"), "no file other.pt"),
        (RemoteFile(REMOTE.repo, REMOTE.file, revision="v9"), "no revision v9"),
    ],
)
def test_what_the_hub_does_not_have_is_named(remote: RemoteFile, says: str) -> None:
    with pytest.raises(HubFileMissingError, match=says):
        pull({"teacher": remote})


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, HubAccessError),
        (404, HubFileMissingError),
        (429, HubUnreachableError),
        (500, HubUnreachableError),
    ],
)
def test_every_refusal_is_one_clear_error(hub: FakeHub, status: int, kind: type[Exception]) -> None:
    hub.status[KEY] = status
    with pytest.raises(kind, match=REMOTE.file):
        _pull()


def test_a_full_disk_is_refused_before_the_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(StorageError, match="needs 1 MB"):
        _pull()
    assert hub.sent == 0


def test_a_disk_that_becomes_full_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pull_module, "http_get", full)
    with pytest.raises(StorageError, match="became full"):
        _pull()


def test_the_command_honours_the_librarys_variables(hub: FakeHub, tmp_path: Path) -> None:
    for part, file in {"tokenizer": "vq_ds16_c2i.pt", "teacher": "c2i_B_256.pt"}.items():
        hub.add("FoundationVision/LlamaGen", file, part.encode())
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, "-m", "server", "pull", "llamagen-b-256"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FoundationVision/LlamaGen/c2i_B_256.pt" in done.stdout and COMMIT in done.stdout
    cached = list(
        (tmp_path / "hf" / "hub").glob("models--FoundationVision--LlamaGen/snapshots/*/c2i_B_256.pt")
    )
    assert [p.read_bytes() for p in cached] == [b"teacher"]
