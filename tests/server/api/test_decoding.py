"""Bodies that are compressed, or in another charset than UTF-8, on every route that reads one."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers

from server.api.decoding import decoded
from server.errors import BodyTooLargeError
from tests.server.helpers import Running, refused, running

LIMIT = 65536
KEY = {"authorization": "Bearer admin-key-of-a-test"}
SHIP = '{"label": "ship", "seed": 7}'
ZIPPED = {"content-encoding": "gzip"}
BODIES = {
    "/generate": SHIP,
    "/v1/images/generations": '{"prompt": "ship", "seed": 7}',
    "/admin/models": '{"model": "nowhere"}',
}


@pytest.fixture(scope="module")
def live(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "admin"
    keys.write_text("ops:admin-key-of-a-test\n")
    with running(bundle_folder, warmup=False, admin_keys_file=keys) as live:
        yield live


def sent(live: Running, path: str, content: bytes, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return live.client.post(
        path, content=content, headers={"content-type": "application/json", **KEY, **named}
    )


def understood(path: str, reply: httpx.Response) -> bool:
    """True where the route has read the body: of `/admin` by what it says of the model."""
    if path.startswith("/admin"):
        return "nowhere" in refused(reply, 400, "invalid_request", "model")
    return reply.status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_gzip_is_decoded(live: Running, path: str) -> None:
    content = gzip.compress(BODIES[path].encode())
    for coding in ("gzip", "x-gzip", "GZIP", "identity, gzip"):
        assert understood(path, sent(live, path, content, content_encoding=coding)), coding
    assert understood(path, sent(live, path, BODIES[path].encode(), content_encoding="identity"))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "x" * 1000])
def test_other_codings_are_named_with_the_one_that_is_read(live: Running, path: str, coding: str) -> None:
    reply = sent(live, path, BODIES[path].encode(), content_encoding=coding)
    assert coding[:60] in refused(reply, 415, "unsupported_encoding")
    assert reply.headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize("path", BODIES)
def test_a_bomb_is_too_large(live: Running, path: str) -> None:
    bomb = gzip.compress(b" " * 30 * 2**20, 9)
    assert len(bomb) < LIMIT
    assert "65536 bytes" in refused(sent(live, path, bomb, content_encoding="gzip"), 413, "body_too_large")


def test_a_bomb_is_not_expanded() -> None:
    bomb = gzip.compress(bytes(60 * 2**20), 9)
    tracemalloc.start()
    with pytest.raises(BodyTooLargeError):
        decoded(Headers(ZIPPED), bomb, LIMIT)
    assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
    tracemalloc.stop()
    assert decoded(Headers(ZIPPED), gzip.compress(b" " * LIMIT), LIMIT) == b" " * LIMIT


@pytest.mark.parametrize(
    "content",
    [
        SHIP.encode(),
        b"",
        gzip.compress(SHIP.encode(), mtime=0)[:-4],
        gzip.compress(SHIP.encode(), mtime=0) + b"more",
        gzip.compress(SHIP.encode(), mtime=0)[:-8] + bytes(8),
        zlib.compress(SHIP.encode()),
    ],
)
def test_what_is_no_gzip_is_said_to_be_none(live: Running, content: bytes) -> None:
    reply = sent(live, "/generate", content, content_encoding="gzip")
    assert "gzip" in refused(reply, 400, "invalid_request", "content-encoding")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8"])
def test_unicode_in_every_form_is_understood(live: Running, path: str, encoding: str) -> None:
    content = BODIES[path].encode(encoding)
    declared = f'application/json; charset="{encoding.removesuffix("-sig").upper()}"'
    assert understood(path, sent(live, path, content))
    assert understood(path, sent(live, path, content, content_type=declared))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("charset", ["iso-8859-1", "windows-1252", "", "x" * 1000])
def test_other_charsets_are_named(live: Running, path: str, charset: str) -> None:
    """They would be read as other words, or fail as JSON with no hint at why."""
    declared = f"application/json; charset={charset}"
    reply = sent(live, path, BODIES[path].encode(), content_type=declared)
    assert charset[:60] in (said := refused(reply, 415, "unsupported_media_type"))
    assert "UTF-8" in said


@pytest.mark.parametrize(
    "content", [SHIP.encode("utf-16")[:-1], '{"label": "\ud800"}'.encode("utf-16", "surrogatepass")]
)
def test_damaged_characters_are_no_json(live: Running, content: bytes) -> None:
    assert "UTF-16" in refused(sent(live, "/generate", content), 400, "invalid_json")


def test_null_is_left_out_in_every_field_of_every_body(live: Running) -> None:
    """But for the one that a body is nothing without."""
    document = live.client.get("/openapi.json").json()["paths"]
    for path, body in BODIES.items():
        schema = document[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        given = json.loads(body)
        for name in schema["properties"]:
            if name not in given:
                reply = live.client.post(path, json={**given, name: None}, headers=KEY)
                assert understood(path, reply), (path, name, reply.text)
        assert len(schema["properties"]) > len(given) - 1
