"""Keys: who is let in, how a file is read again, and that no key is ever told."""

from __future__ import annotations

import hmac
import logging
import os
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import anyio
import httpx
import pytest

from dd_core.errors import InvalidRequestError
from server.app import create_app
from server.middleware import auth
from server.middleware.auth import KeyFile, is_open, parse_keys
from server.models.catalog import find
from server.settings import Settings
from tests.server.clock import Clock
from tests.server.helpers import OK, PATIENCE, Running, eventually, refused, running
from tests.server.test_cli import Run
from tests.server.test_cli import run as run

ALICE = "alice-0123456789abcdef"
ALICE_NEXT = "alice-next-0123456789abcdef"
NAMELESS = "nobody-0123456789abcdef"
ADMIN = "admin-0123456789abcdef"
FILE = f"# the keys\n\nalice:{ALICE}\n  alice:{ALICE_NEXT}  \r\n{NAMELESS}\n"
WRONG = "wrong-0123456789abcdef"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(auth, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(FILE, encoding="ascii")
    return path


@pytest.fixture(scope="module")
def keyed(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with both kinds of keys."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "api").write_text(FILE, encoding="ascii")
    (folder / "admin").write_text(f"root:{ADMIN}\n", encoding="ascii")
    with running(
        bundle_folder, api_keys_file=folder / "api", admin_keys_file=folder / "admin", warmup=False
    ) as live:
        yield live


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# ---- the file


def test_names_comments_and_several_keys_of_one_name() -> None:
    assert [name for name, _ in parse_keys(FILE.encode())] == ["alice", "alice", "line-5"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no keys"),
        ("# nothing but this\n\n", "no keys"),
        ("alice:short\n", "line 1"),
        (f"{ALICE}\nalice: {NAMELESS}\n", "line 2"),
        (f"alice:{ALICE}:more\n", "line 1"),
        (f"al ice:{ALICE}\n", "line 1"),
        (f"alice:{ALICE} {NAMELESS}\n", "line 1"),
        (f"alice:clé-{ALICE}\n", "line 1"),
        (f"{ALICE}\n\nbob:{ALICE}\n", "line 3 repeats the key of line 1"),
        ("x" * 600 + "\n", "line 1"),
        ("".join(f"key-number-{i:08}-of-many\n" for i in range(1001)), "more than 1000"),
        ("#" * (2**20 + 1), "longer than"),
    ],
)
def test_a_bad_file_is_refused_without_telling_its_keys(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidRequestError, match="api_keys_file") as caught:
        KeyFile(path, "api_keys_file")
    assert says in caught.value.message
    assert str(path) in caught.value.message
    for key in (ALICE, NAMELESS, "short", "key-number"):
        assert key not in caught.value.message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InvalidRequestError, match="admin_keys_file"):
            create_app(Settings(admin_keys_file=path))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    with pytest.raises(InvalidRequestError, match="not a regular file"):
        KeyFile(tmp_path / "keys", "api_keys_file")


def test_an_empty_variable_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_SERVER_API_KEYS_FILE", "")
    assert Settings().api_keys_file is None


def test_serve_ends_before_a_model_is_loaded(run: Run, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("", encoding="ascii")
    code, _, error = run("serve", "no-such-model", "--port", 0, "--api-keys-file", tmp_path / "keys")
    assert code == 2
    assert "no keys" in error
    assert "no-such-model" not in error


# ---- comparing


def test_every_key_is_compared_whichever_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an early exit the time of a 401 would tell how far down the list a guess had come."""
    keys = KeyFile(path, "api_keys_file")
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(auth.hmac, "compare_digest", counted)
    for key, name in ((ALICE, "alice"), (NAMELESS, "line-5"), (WRONG, None), ("", None)):
        compared.clear()
        assert keys.name_of(key.encode()) == name
        assert len(compared) == 3
        assert {len(part) for pair in compared for part in pair} == {32}, "digests, not keys"


# ---- reading it again


def name_now(keys: KeyFile, key: str) -> str | None:
    """As for a request that comes now."""
    anyio.run(keys.refresh)
    return keys.name_of(key.encode())


def test_a_new_content_counts_within_a_second(path: Path, clock: Clock) -> None:
    keys = KeyFile(path, "api_keys_file")
    path.write_text(f"bob:{WRONG}\n", encoding="ascii")
    clock.now += 0.5
    assert name_now(keys, WRONG) is None, "looked at the file again within a second"
    clock.now += 0.6
    assert name_now(keys, WRONG) == "bob"
    assert name_now(keys, ALICE) is None


def test_a_mounted_secret_is_swapped_by_its_link(tmp_path: Path, clock: Clock) -> None:
    """As the kubelet does it: the file is a link through `..data`, which is renamed over.

    Both files have the same size and time, so a look at those would miss the change.
    """
    assert len(ALICE) == len(WRONG)
    for name, key in (("old", ALICE), ("new", WRONG)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(key, encoding="ascii")
        os.utime(tmp_path / name / "keys", (1, 1))
    (tmp_path / "..data").symlink_to("old")
    (tmp_path / "keys").symlink_to("..data/keys")
    keys = KeyFile(tmp_path / "keys", "api_keys_file")
    (tmp_path / "..data_tmp").symlink_to("new")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    clock.now += 2
    assert name_now(keys, WRONG) == "line-1"


@pytest.mark.parametrize("bad", ["", "alice:short\n", None])
def test_a_file_that_becomes_bad_keeps_the_keys_and_logs_once(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, bad: str | None
) -> None:
    keys = KeyFile(path, "api_keys_file")
    if bad is None:
        path.unlink()
    else:
        path.write_text(bad, encoding="ascii")
    for _ in range(3):
        clock.now += 2
        assert name_now(keys, ALICE) == "alice"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "keys of before stay" in caplog.text
    assert "short" not in caplog.text
    path.write_text(f"bob:{WRONG}\n", encoding="ascii")
    clock.now += 2
    assert name_now(keys, WRONG) == "bob"


def test_a_mount_that_does_not_answer_holds_up_nobody(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The request that looked waits a second, others not at all; what comes late counts then."""
    keys = KeyFile(path, "api_keys_file")
    answers, real = threading.Event(), auth.open_regular

    def hanging(path: Path) -> BufferedReader:
        assert answers.wait(PATIENCE)
        return real(path)

    monkeypatch.setattr(auth, "open_regular", hanging)
    path.write_text(f"bob:{WRONG}\n", encoding="ascii")
    for _ in range(3):
        clock.now += 2
        assert name_now(keys, ALICE) == "alice"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "not be read within 1 s; the keys of before stay" in caplog.text
    answers.set()
    eventually(lambda: keys.name_of(WRONG.encode()) == "bob", "the new keys count")


def test_a_process_ends_although_its_keys_are_being_read(path: Path, clock: Clock) -> None:
    """The thread that reads is of no pool, for which the interpreter would wait."""
    keys = KeyFile(path, "api_keys_file")
    clock.now += 2
    reading: list[bool] = []
    keys._look = lambda: reading.append(threading.current_thread().daemon)  # type: ignore[method-assign]
    anyio.run(keys.refresh)
    assert reading == [True]


# ---- over HTTP


def test_generate_and_models_need_a_key(keyed: Running) -> None:
    for send in (lambda **h: keyed.post(OK, **h), lambda **h: keyed.client.get("/models", headers=h)):
        for headers in (
            {},
            bearer(WRONG),
            {"authorization": "Bearer"},
            {"authorization": f"Basic {ALICE}"},
            bearer(ADMIN),
        ):
            reply = send(**headers)
            assert "X-API-Key" in refused(reply, 401, "unauthorized")
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.headers["x-request-id"]
        for headers in (
            bearer(ALICE),
            bearer(ALICE_NEXT),
            bearer(NAMELESS),
            {"x-api-key": ALICE},
            {"authorization": f"bearer  {ALICE}"},
            {"authorization": "Basic dXNlcjpwYXNz", "x-api-key": ALICE},
        ):
            assert send(**headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/static/app.js", "/metrics", "/healthz"])
def test_what_stays_open(keyed: Running, path: str) -> None:
    assert keyed.client.get(path).status_code == 200
    assert keyed.client.get("/readyz").status_code == 200


def test_every_other_path_is_closed(keyed: Running) -> None:
    """So that a route which is added later needs a key until somebody opens it."""
    for path in ("/v1/images/generations", "/nothing", "/static", "/models/", "/openapi.json/", "//models"):
        assert keyed.client.get(keyed.url + path).status_code == 401, path
    assert {path for path in create_app(Settings()).openapi()["paths"] if is_open(path)} == {
        "/healthz",
        "/readyz",
        "/metrics",
    }


def test_a_body_that_is_sent_without_a_key_does_not_hide_the_answer(keyed: Running) -> None:
    """The client sends 20 MB before it reads; the connection still serves the next request."""
    reply = keyed.client.post("/generate", content=b"x" * 20_000_000)
    refused(reply, 401, "unauthorized")
    assert keyed.post(OK, **bearer(ALICE)).status_code == 200


@pytest.mark.parametrize("path", ["/admin", "/admin/secrets"])
def test_admin_needs_its_own_key_and_does_not_exist_without_a_file(
    keyed: Running, server: Running, path: str
) -> None:
    refused(server.client.get(path), 404, "not_found")
    assert "admin" in refused(keyed.client.get(path), 401, "unauthorized")
    refused(keyed.client.get(path, headers=bearer(ALICE)), 401, "unauthorized")
    refused(keyed.client.get(path, headers=bearer(ADMIN)), 404, "not_found")  # let in; there is no such route


def test_admin_routes_stay_hidden_without_a_file_even_where_there_are_some(bundle_folder: Path) -> None:
    app = create_app(Settings(), [find(bundle_folder)])
    app.add_api_route("/admin/secret", lambda: "told", methods=["GET"])

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            refused(await client.get("/admin/secret"), 404, "not_found")

    anyio.run(ask)


def test_a_key_is_never_logged(keyed: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    keyed.post(OK, **bearer(ALICE))
    keyed.post(OK, **{"x-api-key": WRONG})
    assert caplog.records
    for record in caplog.records:
        assert ALICE not in repr(record.__dict__)
        assert WRONG not in repr(record.__dict__)
