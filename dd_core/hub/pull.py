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
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import hf_hub_download, http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from dd_core.errors import (
    HashMismatchError,
    HubAccessError,
    HubError,
    HubFileMissingError,
    HubUnreachableError,
)
from dd_core.hub.spec import PartName, RemoteFile
from dd_core.hub.storage import check_room, exclusive, gigabytes, room_errors

log = logging.getLogger("dd_core.hub")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RANGE_NOT_SATISFIABLE = 416
_BY_HAND = "or fetch the files elsewhere and convert them: dd-server convert NAME --tokenizer FILE …"


@dataclass(frozen=True)
class PulledFile:
    """A file of the hub on this disk.

    Args:
        revision: the commit that it is of; None where the cache does not tell.
        sha256: of its bytes, which were checked where the hub states it.
    """

    path: Path
    remote: RemoteFile
    revision: str | None
    sha256: str


@dataclass(frozen=True)
class _Remote:
    """The hub's facts about a file; `etag` is its SHA-256 where it is large."""

    etag: str
    commit: str
    size: int


def pull(files: Mapping[PartName, RemoteFile]) -> dict[PartName, PulledFile]:
    """Brings the files of a model here, unless they are; room is checked for all before the first.

    Raises:
        HubError: see its kinds: unreachable, refused, missing.
        StorageError: no room.
        HashMismatchError: what came is not what the hub announced; it is deleted.
    """
    cached = {part: _cached(file) for part, file in files.items()}
    if constants.is_offline_mode():
        missing = [f"{f.repo}/{f.file}" for part, f in files.items() if cached[part] is None]
        if missing:
            raise HubUnreachableError(
                f"HF_HUB_OFFLINE is set and {', '.join(missing)} is not in {constants.HF_HUB_CACHE}: "
                f"unset it, {_BY_HAND}",
                param="HF_HUB_OFFLINE",
            )
        return {part: _finished(files[part], path) for part, path in cached.items() if path is not None}
    remote = {part: _ask(file, cached[part]) for part, file in files.items()}
    wanted = {part: r for part, r in remote.items() if r is not None and not _blob(files[part], r).exists()}
    folder = Path(constants.HF_HUB_CACHE)
    check_room(folder, sum(_left(files[part], r) for part, r in wanted.items()), "the download")
    out: dict[PartName, PulledFile] = {}
    for part, file in files.items():
        found = remote[part]
        if found is None:
            path = cached[part]
            assert path is not None, "_ask raises where nothing is cached"
        else:
            path = _fetch(file, found)
        out[part] = _finished(file, path)
    return out


def _cached(file: RemoteFile) -> Path | None:
    found = try_to_load_from_cache(file.repo, file.file, revision=file.revision)
    return Path(found) if isinstance(found, str) else None


def _ask(file: RemoteFile, cached: Path | None) -> _Remote | None:
    """The hub's facts about the file; None where it cannot be asked, but the file is cached."""
    url = hf_hub_url(file.repo, file.file, revision=file.revision)
    try:
        with _hub_errors(file):
            found = get_hf_file_metadata(url)
    except HubUnreachableError:
        if cached is None:
            raise
        log.warning("the hub cannot be reached: %s/%s is taken from the cache", file.repo, file.file)
        return None
    if found.etag is None or found.commit_hash is None or found.size is None:
        raise HubUnreachableError(
            f"{constants.ENDPOINT} answers about {file.repo}/{file.file}, but not as a hub does: is "
            "HF_ENDPOINT right, or does a proxy stand between?",
            param="HF_ENDPOINT",
        )
    return _Remote(found.etag, found.commit_hash, found.size)


def _blob(file: RemoteFile, remote: _Remote) -> Path:
    folder = repo_folder_name(repo_id=file.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "blobs" / remote.etag


def _partial(file: RemoteFile, remote: _Remote) -> Path:
    blob = _blob(file, remote)
    return blob.with_name(f"{blob.name}.dd-partial")


def _left(file: RemoteFile, remote: _Remote) -> int:
    partial = _partial(file, remote)
    return remote.size - (partial.stat().st_size if partial.exists() else 0)


def _fetch(file: RemoteFile, remote: _Remote) -> Path:
    """Downloads what is left of a file, checks it, and puts it into the cache."""
    blob, partial = _blob(file, remote), _partial(file, remote)
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / blob.parent.parent.name / f"{partial.name}.lock"
    with exclusive(lock):
        if not blob.exists():
            with _hub_errors(file), room_errors(blob.parent, "the download"):
                _transfer(file, remote, partial)
            _check_hash(partial, remote.etag, f"{file.repo}/{file.file}")
            partial.replace(blob)
    # The library finds the blob and links it into its snapshot, without a transfer.
    with _hub_errors(file):
        return Path(hf_hub_download(file.repo, file.file, revision=file.revision))


def _transfer(file: RemoteFile, remote: _Remote, partial: Path) -> None:
    """Adds to `partial` what it lacks; what has come stays there, whatever happens."""
    have = partial.stat().st_size if partial.exists() else 0
    if have:
        log.info("%s/%s: going on after %s", file.repo, file.file, gigabytes(have))
    with partial.open("ab") as out:
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
        except HfHubHTTPError as error:
            if error.response.status_code == _RANGE_NOT_SATISFIABLE:
                out.truncate(0)  # the file is shorter there than what is here: begin anew next time
            raise


def _finished(file: RemoteFile, path: Path) -> PulledFile:
    """A cached file, read once more: the disk may have lost a bit since."""
    blob = path.resolve()
    sha256 = _check_hash(blob, blob.name, str(path))
    commit = next((p.name for p in path.parents if p.parent.name == "snapshots"), None)
    return PulledFile(path, file, commit, sha256)


def _check_hash(path: Path, etag: str, what: str) -> str:
    """The file's SHA-256. Large files have theirs as the hub's tag; another tag says nothing of it."""
    with path.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
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
    what = f"{file.repo}/{file.file}"
    try:
        yield
    except (GatedRepoError, LocalTokenNotFoundError) as error:
        raise HubAccessError(f"{what}: {_first(error)}; accept its terms and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise HubFileMissingError(
            f"the hub has no repository {file.repo}, or it is private: set HF_TOKEN if you may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise HubFileMissingError(f"{file.repo} has no revision {file.revision or 'main'}") from error
    except RemoteEntryNotFoundError as error:
        raise HubFileMissingError(
            f"{file.repo} has no file {file.file} at revision {file.revision or 'main'}: it may have been "
            "renamed"
        ) from error
    except HfHubHTTPError as error:
        raise _refused(what, error) from error
    except (
        httpx2.HTTPError,
        httpx2.InvalidURL,
        OfflineModeIsEnabled,
        FileMetadataError,
        LocalEntryNotFoundError,
    ) as error:
        raise HubUnreachableError(
            f"{what}: {constants.ENDPOINT} cannot be reached or broke off ({_first(error)}). Run the "
            f"command again to go on where it ended, {_BY_HAND}",
            param="HF_ENDPOINT",
        ) from error
    except OSError as error:
        if not str(error).startswith("Consistency check failed"):
            raise
        raise HubUnreachableError(
            f"{what}: the transfer ended before the file did; run the command again to go on"
        ) from error


def _refused(what: str, error: HfHubHTTPError) -> HubError:
    status = error.response.status_code
    if status in (401, 403):
        return HubAccessError(f"{what}: the hub refuses ({status}): set HF_TOKEN to a token that may read it")
    if status == 404:
        return HubFileMissingError(f"{what}: the hub has no such file")
    return HubUnreachableError(f"{what}: the hub answers with status {status}; try later, {_BY_HAND}")


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
