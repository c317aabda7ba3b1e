"""Published files → the hub's local cache: resumable, checked, and shared with other programs.

    HEAD (commit, size, SHA-256) ─▶ cached? ─▶ partial file ─▶ GET, from where it ended ─▶ hash ─▶ cache

The cache, its place and the token are those of `huggingface_hub` (`HF_HOME`, `HF_ENDPOINT`,
`HF_TOKEN`, `HF_HUB_OFFLINE`). The transfer is ours, because that library begins anew when a
process ends in the middle of a file, and does not check hashes.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub import errors as hub
from huggingface_hub.file_download import hf_hub_download, http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from dd_core.errors import (
    HashMismatchError,
    HubAccessError,
    HubFileMissingError,
    HubUnreachableError,
    WeightsError,
    reason,
)
from dd_core.hub.spec import PartName, RemoteFile
from dd_core.hub.storage import check_room, exclusive, gigabytes, room_errors
from dd_core.manifest import Source

log = logging.getLogger("dd_core.hub")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANGE_NOT_SATISFIABLE = 416
_BY_HAND = "or fetch the files elsewhere and convert them: dd-server convert NAME --tokenizer FILE …"


@dataclass(frozen=True)
class LocalFile:
    """A checkpoint on this disk, and what is known of where it came from.

    Its SHA-256 was checked where the hub states it. The revision is a commit; None where the cache does not
    tell.
    """

    path: Path
    source: Source

    @classmethod
    def by_hand(cls, part: PartName, path: Path) -> LocalFile:
        """A file that the user has.

        Raises:
            WeightsError: it cannot be read.
        """
        try:
            return cls(path, Source(part=part, file=path.name, sha256=_sha256(path)))
        except OSError as error:
            raise WeightsError(f"{path}: {reason(error)}", param=part) from error


@dataclass(frozen=True)
class _Remote:
    """The hub's facts about a file, and its places in the cache; `etag` is its SHA-256 where it is large."""

    file: RemoteFile
    etag: str
    commit: str
    size: int

    @property
    def blob(self) -> Path:
        folder = repo_folder_name(repo_id=self.file.repo, repo_type="model")
        return Path(constants.HF_HUB_CACHE) / folder / "blobs" / self.etag

    @property
    def partial(self) -> Path:
        return self.blob.with_name(f"{self.etag}.dd-partial")

    @property
    def received(self) -> int:
        """Bytes that have come."""
        return next((path.stat().st_size for path in (self.blob, self.partial) if path.exists()), 0)


def pull(files: Mapping[PartName, RemoteFile]) -> dict[PartName, LocalFile]:
    """Brings the files of a model here, unless they are; room is checked for all before the first.

    Raises:
        HubError: see its kinds: unreachable, refused, missing.
        StorageError: no room.
        HashMismatchError: what came is not what the hub announced; it is deleted.
    """
    cached = {part: _cached(file) for part, file in files.items()}
    offline = constants.is_offline_mode()
    missing = [str(file) for part, file in files.items() if cached[part] is None]
    if offline and missing:
        raise HubUnreachableError(
            f"HF_HUB_OFFLINE is set and {', '.join(missing)} is not in {constants.HF_HUB_CACHE}: "
            f"unset it, {_BY_HAND}",
            param="HF_HUB_OFFLINE",
        )
    remote = {part: None if offline else _ask(file, cached[part]) for part, file in files.items()}
    left = sum(found.size - found.received for found in remote.values() if found is not None)
    check_room(Path(constants.HF_HUB_CACHE), left, "the download")
    out: dict[PartName, LocalFile] = {}
    for part, found in remote.items():
        path = cached[part] if found is None else _fetch(found)
        assert path is not None, "_ask raises where nothing is cached"
        out[part] = _finished(part, files[part], path)
    return out


def _cached(file: RemoteFile) -> Path | None:
    found = try_to_load_from_cache(file.repo, file.file, revision=file.revision)
    return Path(found) if isinstance(found, str) else None


def _ask(file: RemoteFile, cached: Path | None) -> _Remote | None:
    """The hub's facts about the file; None where it cannot be asked, but the file is cached."""
    try:
        with _hub_errors(file):
            found = get_hf_file_metadata(hf_hub_url(file.repo, file.file, revision=file.revision))
    except HubUnreachableError:
        if cached is None:
            raise
        log.warning("the hub cannot be reached: %s is taken from the cache", file)
        return None
    if found.etag is None or found.commit_hash is None or found.size is None:
        raise HubUnreachableError(
            f"{constants.ENDPOINT} answers about {file}, but not as a hub does: is "
            "HF_ENDPOINT right, or does a proxy stand between?",
            param="HF_ENDPOINT",
        )
    return _Remote(file, found.etag, found.commit_hash, found.size)


def _fetch(remote: _Remote) -> Path:
    """Downloads what is left of a file, checks it, and puts it into the cache."""
    file, blob, partial = remote.file, remote.blob, remote.partial
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / blob.parent.parent.name / f"{partial.name}.lock"
    with exclusive(lock):
        if not blob.exists():
            with _hub_errors(file), room_errors(blob.parent, "the download"):
                _transfer(remote)
            _check_hash(partial, remote.etag, str(file))
            partial.replace(blob)
    # The library finds the blob and links it into its snapshot, without a transfer.
    with _hub_errors(file):
        return Path(hf_hub_download(file.repo, file.file, revision=file.revision))


def _transfer(remote: _Remote) -> None:
    """Adds to the partial file what it lacks; what has come stays there, whatever happens."""
    file, have = remote.file, remote.received
    if have:
        log.info("%s: going on after %s", file, gigabytes(have))
    with remote.partial.open("ab") as out:
        try:
            http_get(
                # Of the commit, not of the branch: a branch that moves must not mix two versions.
                hf_hub_url(file.repo, file.file, revision=remote.commit),
                out,
                resume_size=have,
                headers=build_hf_headers(library_name="distilled-decoding"),
                expected_size=remote.size,
                displayed_filename=file.file,
            )
        except hub.HfHubHTTPError as error:
            if error.response.status_code == _RANGE_NOT_SATISFIABLE:
                out.truncate(0)  # the file is shorter there than what is here: begin anew next time
            raise


def _finished(part: PartName, file: RemoteFile, path: Path) -> LocalFile:
    """A cached file, read once more: the disk may have lost a bit since."""
    blob = path.resolve()
    sha256 = _check_hash(blob, blob.name, str(path))
    commit = next((p.name for p in path.parents if p.parent.name == "snapshots"), None)
    source = Source(part=part, file=file.file, sha256=sha256, repo=file.repo, revision=commit)
    return LocalFile(path, source)


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _check_hash(path: Path, etag: str, what: str) -> str:
    """The file's SHA-256. Large files have theirs as the hub's tag; another tag says nothing of it."""
    found = _sha256(path)
    if _SHA256.fullmatch(etag) and found != etag:
        path.unlink()
        raise HashMismatchError(
            f"{what}: SHA-256 is {found[:12]}…, the hub says {etag[:12]}…: it was damaged on the way or on "
            "this disk, and is deleted; run the command again",
            param="file",
        )
    return found


@contextmanager
def _hub_errors(file: RemoteFile) -> Iterator[None]:
    """The library's many exceptions → ours, each with what to do."""
    revision = file.revision or "main"
    try:
        yield
    except (hub.GatedRepoError, hub.LocalTokenNotFoundError) as error:
        raise HubAccessError(f"{file}: {_first(error)}; accept its terms and set HF_TOKEN") from error
    except hub.RepositoryNotFoundError as error:
        raise HubFileMissingError(
            f"the hub has no repository {file.repo}, or it is private: set HF_TOKEN if you may read it"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise HubFileMissingError(f"{file.repo} has no revision {revision}") from error
    except hub.RemoteEntryNotFoundError as error:
        raise HubFileMissingError(
            f"{file.repo} has no file {file.file} at revision {revision}: it may have been renamed"
        ) from error
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            says = f"{file}: the hub refuses ({status}): set HF_TOKEN to a token that may read it"
            raise HubAccessError(says) from error
        if status == 404:
            raise HubFileMissingError(f"{file}: the hub has no such file") from error
        says = f"{file}: the hub answers with status {status}; try later, {_BY_HAND}"
        raise HubUnreachableError(says) from error
    except (
        httpx2.HTTPError,
        httpx2.InvalidURL,
        hub.OfflineModeIsEnabled,
        hub.FileMetadataError,
        hub.LocalEntryNotFoundError,
    ) as error:
        raise HubUnreachableError(
            f"{file}: {constants.ENDPOINT} cannot be reached or broke off ({_first(error)}). Run the "
            f"command again to go on where it ended, {_BY_HAND}",
            param="HF_ENDPOINT",
        ) from error
    except OSError as error:
        if not str(error).startswith("Consistency check failed"):
            raise
        raise HubUnreachableError(
            f"{file}: the transfer ended before the file did; run the command again to go on"
        ) from error


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
