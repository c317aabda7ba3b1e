"""Pages of other origins: preflights, what they may read, and errors that they can read too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dd_core.errors import InvalidRequestError
from server.settings import load_settings
from tests.server.helpers import OK, Running, refused, running

PAGE = "https://page.example"
KEY = "page-0123456789abcdef"


@pytest.fixture(scope="module")
def shared(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that one other origin may ask, with a key."""
    keys = tmp_path_factory.mktemp("cors") / "keys"
    keys.write_text(KEY, encoding="ascii")
    with running(
        bundle_folder, cors_origins=f"{PAGE}, http://localhost:3000", api_keys_file=keys, warmup=False
    ) as live:
        yield live


def preflight(live: Running, origin: str = PAGE, method: str = "POST", headers: str = "") -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": method}
    if headers:
        asked["access-control-request-headers"] = headers
    return live.client.options("/generate", headers=asked)


def listed(reply: httpx.Response, header: str) -> set[str]:
    return {part.strip().lower() for part in reply.headers[header].split(",")}


def test_a_preflight_is_answered_without_a_key(shared: Running) -> None:
    reply = preflight(shared, headers="authorization, content-type, x-api-key, x-request-id, traceparent")
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert listed(reply, "access-control-allow-methods") == {"get", "post"}
    assert "access-control-allow-credentials" not in reply.headers
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"origin": "https://other.example"}, "'https://other.example' is none of --cors-origins"),
        ({"method": "DELETE"}, "GET and POST, not 'DELETE'"),
        ({"origin": "x" * 5000, "method": "y" * 5000}, "x…"),
    ],
)
def test_a_refused_preflight_names_what_is_refused(shared: Running, asked: dict[str, str], says: str) -> None:
    reply = preflight(shared, **asked)
    assert says in refused(reply, 400, "invalid_request")
    if "origin" in asked:
        assert "access-control-allow-origin" not in reply.headers


def test_a_page_may_send_whatever_headers_its_client_has(shared: Running) -> None:
    """OpenAI's client for JavaScript describes itself in a dozen of its own."""
    own = "authorization,content-type,x-stainless-arch,x-stainless-retry-count,x-surprise"
    reply = preflight(shared, headers=own)
    assert reply.status_code == 200
    assert set(own.split(",")) <= listed(reply, "access-control-allow-headers")


def test_a_public_page_may_ask_a_server_of_a_private_network(shared: Running) -> None:
    """Chrome asks for that beforehand, and takes a refusal of it for one of the request."""
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    reply = shared.client.options(
        "/generate", headers={**asked, "access-control-request-private-network": "true"}
    )
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-private-network"] == "true"


def test_a_page_can_read_every_header_that_a_reply_has(shared: Running) -> None:
    """A header that the server sends and CORS does not expose is invisible to the page."""
    headers = {"origin": PAGE, "x-api-key": KEY, "accept": "image/png"}
    reply = shared.post(OK, **headers)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    ours = {name for name in reply.headers if name.startswith("x-")}
    assert len(ours) > 5
    assert ours | {"retry-after", "content-disposition"} <= listed(reply, "access-control-expose-headers")
    assert {"accept", "origin"} <= listed(reply, "vary")


def test_errors_are_readable_too(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the header a page sees "network error" in place of the message."""
    key = {"x-api-key": KEY}

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    replies = [
        shared.post(OK, origin=PAGE),
        shared.post({}, origin=PAGE, **key),
        shared.client.post("/generate", content=b"x" * 70_000, headers={"origin": PAGE, **key}),
        shared.client.get("/nothing", headers={"origin": PAGE, **key}),
    ]
    monkeypatch.setattr(shared.state.encoder, "encode_all", broken)
    replies.append(shared.post(OK, origin=PAGE, **key))
    assert [reply.status_code for reply in replies] == [401, 400, 413, 404, 500]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == PAGE


def test_another_origin_is_told_nothing(shared: Running) -> None:
    reply = shared.post(OK, origin="https://other.example", **{"x-api-key": KEY})
    assert "access-control-allow-origin" not in reply.headers


def test_any_origin(bundle_folder: Path) -> None:
    with running(bundle_folder, cors_origins="*", warmup=False) as live:
        assert preflight(live, "https://any.example").headers["access-control-allow-origin"] == "*"
        assert live.post(OK, origin="https://any.example").headers["access-control-allow-origin"] == "*"


def test_no_origin_by_default(server: Running) -> None:
    refused(preflight(server), 405, "method_not_allowed")
    assert "access-control-allow-origin" not in server.post(OK, origin=PAGE).headers


def test_origins_come_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_SERVER_CORS_ORIGINS", f"{PAGE},http://[::1]:8080")
    assert load_settings().cors_origins == (PAGE, "http://[::1]:8080")
    assert load_settings(cors_origins="*").cors_origins == ("*",)
    assert load_settings(cors_origins="").cors_origins == ()


@pytest.mark.parametrize(
    "value", ["page.example", f"{PAGE}/", "*,https://a.example", "https://Page.example", "null", "ftp://a"]
)
def test_what_is_no_origin_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="DD_SERVER_CORS_ORIGINS"):
        load_settings(cors_origins=value)
