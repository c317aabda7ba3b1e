"""API keys: which key a path needs.

    open        probes, /metrics, the page with its files, /docs and the OpenAPI document
    API key     everything else, where there is a file of API keys
    admin key   /admin, which does not exist without a file of admin keys

A path that is not listed as open needs a key, so a route that is added later is closed until
somebody opens it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dd_core.errors import InvalidRequestError, reason
from dd_core.regular import open_regular
from server.errors import UnauthorizedError, error_response, not_found
from server.observability.context import PROBES, context_of
from server.settings import Settings

log = logging.getLogger("dd_server")

_PAGES = ("/", "/docs", "/models.html", "/metrics.html", "/favicon.ico")
_OPEN = frozenset({*_PAGES, *PROBES, "/openapi.json"})
_OPEN_FOLDER = "/static/"
_ADMIN = "/admin"

_LEAST_CHARACTERS = 16
_MOST_BYTES = 2**20
_MOST_KEYS = 1000
_LINE = re.compile(rf"(?:(?P<name>[A-Za-z0-9._\-]{{1,64}}):)?(?P<key>[!-9;-~]{{{_LEAST_CHARACTERS},512}})")
_CHECK_SECONDS = 1.0
_PATIENCE = 1.0  # seconds that a request waits for a file of keys


def parse_keys(data: bytes) -> list[tuple[str, bytes]]:
    """Parse a file of keys, `name:key` or `key` a line and `#` comments, into names and SHA-256 digests.

    A key without a name is called after its line. One name may have several keys, so that the
    next one can be handed out before the last one is withdrawn.

    Raises:
        ValueError: what is wrong, by line number and without a word of the line itself.
    """
    if len(data) > _MOST_BYTES:
        raise ValueError(f"longer than {_MOST_BYTES} bytes")
    keys: list[tuple[str, bytes]] = []
    lines: dict[bytes, int] = {}
    for number, raw in enumerate(data.split(b"\n"), 1):
        line = raw.strip()
        if not line or line.startswith(b"#"):
            continue
        match = _LINE.fullmatch(line.decode("latin-1"))
        if match is None:
            raise ValueError(
                f"line {number} is neither name:key nor key; a name has letters, digits, '.', '_' and '-', "
                f"a key {_LEAST_CHARACTERS} to 512 ASCII characters without space or colon"
            )
        digest = hashlib.sha256(match["key"].encode("ascii")).digest()
        if digest in lines:
            raise ValueError(f"line {number} repeats the key of line {lines[digest]}")
        lines[digest] = number
        keys.append((match["name"] or f"line-{number}", digest))
    if not keys:
        raise ValueError("no keys in it")
    if len(keys) > _MOST_KEYS:
        raise ValueError(f"more than {_MOST_KEYS} keys")
    return keys


class KeyFile:
    """The keys of a file, read again when its content changes, looked at once a second at most.

    The content is compared and not the time of change: a mounted Secret is swapped by a symbolic
    link, and an editor may write twice within the clock's tick.

    Raises:
        InvalidRequestError: unreadable, empty or malformed; later such content is only logged, and
            the keys of before stay.
    """

    def __init__(self, path: Path, param: str) -> None:
        self._path, self._param = path, param
        self._complaint, self._seen = "", b""
        self._checked = time.monotonic()
        self._looking = False
        try:
            self._read()
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"{param}: {path}: {reason(error)}", param=param) from None

    def name_of(self, key: bytes) -> str | None:
        """The name of `key`, or None. Takes the same time whichever of the keys it is, if any."""
        digest = hashlib.sha256(key).digest()
        found = [name for name, known in self._keys if hmac.compare_digest(digest, known)]
        return found[0] if found else None

    async def refresh(self) -> None:
        """Look at the file again if that is due. A file system that does not answer, as a mount whose server
        is gone, is waited for a second; until it answers, the keys of before stay.
        """
        now = time.monotonic()
        if self._looking or now - self._checked < _CHECK_SECONDS:
            return
        self._checked, self._looking = now, True
        loop, looked = asyncio.get_running_loop(), asyncio.Event()

        def look() -> None:
            try:
                self._look()
            finally:
                self._looking = False
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(looked.set)

        # Of no pool: the end of the process would wait for its threads.
        threading.Thread(target=look, name="dd-keys", daemon=True).start()
        try:
            await asyncio.wait_for(looked.wait(), _PATIENCE)
        except TimeoutError:
            self._complain(f"it could not be read within {_PATIENCE:g} s")

    def _read(self) -> bool:
        """Read the keys; False where the file is as it was."""
        with open_regular(self._path) as file:
            content = file.read(_MOST_BYTES + 1)
        digest = hashlib.sha256(content).digest()
        if digest == self._seen:
            return False
        self._keys = parse_keys(content)
        self._seen = digest
        return True

    def _look(self) -> None:
        try:
            if self._read():
                log.info("%s: %s: %d keys read", self._param, self._path, len(self._keys))
            self._complaint = ""
        except (OSError, ValueError) as error:
            self._complain(reason(error))

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            log.error("%s: %s: %s; the keys of before stay", self._param, self._path, complaint)
        self._complaint = complaint


class RequireKey:
    """Answer 401 to a request whose path needs a key that it does not bring.

    The name of the key goes into the request context, the key itself nowhere.
    """

    def __init__(self, app: ASGIApp, api_keys: KeyFile | None, admin_keys: KeyFile | None) -> None:
        self.app = app
        self.api_keys = api_keys
        self.admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        admin = path == _ADMIN or path.startswith(_ADMIN + "/")
        keys = self.admin_keys if admin else self.api_keys
        if keys is None and admin:
            await not_found(path)(scope, receive, send)
            return
        if keys is not None and not is_open(path):
            headers = Headers(scope=scope)
            scheme, _, token = headers.get("authorization", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            await keys.refresh()
            name = keys.name_of(given.encode("latin-1"))
            if name is None:
                kind = "an admin key" if admin else "an API key"
                message = f"this needs {kind}: send Authorization: Bearer KEY, or X-API-Key: KEY"
                await error_response(UnauthorizedError(message))(scope, receive, send)
                return
            context_of(scope)["key"] = name
        await self.app(scope, receive, send)


def is_open(path: str) -> bool:
    """True for a path that is answered without a key."""
    return path in _OPEN or path.startswith(_OPEN_FOLDER)


def read_keys(settings: Settings) -> tuple[KeyFile | None, KeyFile | None]:
    """Read the files of API keys and of admin keys that `settings` name.

    Raises:
        InvalidRequestError: a file is unreadable, empty or malformed.
    """
    files = {"api_keys_file": settings.api_keys_file, "admin_keys_file": settings.admin_keys_file}
    api, admin = (None if path is None else KeyFile(path, param) for param, path in files.items())
    return api, admin
