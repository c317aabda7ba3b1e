"""What a trusted proxy says: who the client is, and what links begin with."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from server.app import create_app
from server.links import base_url
from server.middleware.proxies import ProxyHeaders
from server.settings import Settings, load_settings
from tests.server.helpers import Running

PROXY = "127.0.0.1"
HEADERS = {
    "x-forwarded-proto": "https",
    "x-forwarded-host": "img.example",
    "x-forwarded-prefix": "/dd",
    "x-forwarded-for": "9.9.9.9",
}
FORWARDED = {"forwarded": 'for="[2001:db8::7]:4711";proto=https;host="img.example:8443"'}


def told(
    headers: dict[str, str] | list[tuple[str, str]],
    trusted: str = PROXY,
    client: str = PROXY,
    public_url: str = "",
) -> tuple[str, str]:
    """The client and the base of links, as an application behind the middleware sees them."""
    found: list[tuple[str, str]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append((scope["client"][0], base_url(scope)))
        await PlainTextResponse("")(scope, receive, send)

    async def ask() -> None:
        transport = httpx.ASGITransport(ProxyHeaders(app, trusted, public_url), client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://inside:8000") as asking:
            await asking.get("/models", headers=headers)

    asyncio.run(ask())
    return found[0]


INSIDE = "http://inside:8000"


@pytest.mark.parametrize(
    ("trusted", "client", "seen"),
    [
        ("127.0.0.1", "127.0.0.1", None),
        ("127.0.0.1", "::ffff:127.0.0.1", None),
        ("::ffff:127.0.0.1", "127.0.0.1", None),
        ("::ffff:10.0.0.0/104", "10.1.2.3", None),
        ("10.0.0.0/8", "::ffff:10.1.2.3", None),
        ("127.0.0.1,::1", "::1", None),
        ("fe80::/10", "fe80::1%eth0", None),
        ("*", "203.0.113.1", None),
        ("::/0", "203.0.113.1", "203.0.113.1"),
        ("127.0.0.1", "::1", "::1"),
        ("10.0.0.0/8", "::ffff:203.0.113.1", "203.0.113.1"),
        ("", "::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_addresses_are_compared_as_what_they_are(trusted: str, client: str, seen: str | None) -> None:
    expected = ("9.9.9.9", "https://img.example/dd") if seen is None else (seen, INSIDE)
    assert told(HEADERS, trusted, client) == expected


def test_both_loopbacks_are_trusted_by_default() -> None:
    for client in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert told(HEADERS, Settings().trusted_proxies, client)[0] == "9.9.9.9"


@pytest.mark.parametrize(
    ("hops", "client"),
    [
        ("9.9.9.9", "9.9.9.9"),
        ("6.6.6.6, 9.9.9.9, 127.0.0.1", "9.9.9.9"),  # what the client says of itself comes first
        ("9.9.9.9:5678", "9.9.9.9"),
        ("[2001:db8::7]:443", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("2001:db8::7", "2001:db8::7"),
        ("::ffff:9.9.9.9, ::FFFF:7f00:1", "9.9.9.9"),
        ("127.0.0.1", "127.0.0.1"),
        ("unknown", "unknown"),
        ("x" * 5000, "x" * 64),
        (" , ", PROXY),
        ("", PROXY),
    ],
)
def test_the_client_is_the_last_that_is_no_proxy(hops: str, client: str) -> None:
    assert told({"x-forwarded-for": hops})[0] == client


def test_with_any_proxy_trusted_the_client_is_the_first() -> None:
    assert told({"x-forwarded-for": "6.6.6.6, 9.9.9.9"}, "*")[0] == "6.6.6.6"


def test_a_header_may_come_in_lines() -> None:
    assert told([("x-forwarded-for", "9.9.9.9"), ("x-forwarded-for", PROXY)])[0] == "9.9.9.9"


@pytest.mark.parametrize(
    ("headers", "base"),
    [
        ({}, INSIDE),
        ({"x-forwarded-proto": "https"}, "https://inside:8000"),
        ({"x-forwarded-proto": "HTTPS, http"}, "https://inside:8000"),
        ({"x-forwarded-proto": "javascript"}, INSIDE),
        ({"x-forwarded-host": "img.example:8443, b.example"}, "http://img.example:8443"),
        ({"x-forwarded-host": "img.example", "x-forwarded-port": "8080"}, "http://img.example:8080"),
        ({"x-forwarded-host": "img.example", "x-forwarded-port": "80"}, "http://img.example"),
        ({"x-forwarded-host": "img.example:1", "x-forwarded-port": "2"}, "http://img.example:1"),
        ({"x-forwarded-host": "img.example", "x-forwarded-port": "x"}, "http://img.example"),
        ({"x-forwarded-host": "[::1]", "x-forwarded-port": "8080"}, "http://[::1]:8080"),
        ({"x-forwarded-host": "evil.example/x?"}, INSIDE),
        ({"x-forwarded-host": "a@evil.example"}, INSIDE),
        ({"host": "img.example", "x-forwarded-port": "8443"}, "http://img.example:8443"),
        ({"x-forwarded-prefix": "/dd/"}, f"{INSIDE}/dd"),
        ({"x-forwarded-prefix": "/a/b"}, f"{INSIDE}/a/b"),
        ({"x-forwarded-prefix": "/"}, INSIDE),
        ({"x-forwarded-prefix": "//evil.example"}, INSIDE),
        ({"x-forwarded-prefix": "dd"}, INSIDE),
        ({"x-forwarded-prefix": "/" + "d" * 300}, INSIDE),
        (FORWARDED, "https://img.example:8443"),
        ({**FORWARDED, "x-forwarded-prefix": "/dd"}, "https://img.example:8443/dd"),
        ({**FORWARDED, "x-forwarded-host": "other.example"}, "http://other.example"),
        ({"forwarded": "for=1.1.1.1;Host=a.example , for=2.2.2.2;host=b.example"}, "http://a.example"),
        ({"forwarded": 'host="unfinished'}, INSIDE),
        ({"forwarded": ""}, INSIDE),
    ],
)
def test_links_begin_with_what_the_proxy_says(headers: dict[str, str], base: str) -> None:
    assert told(headers)[1] == base
    own = f"http://{headers['host']}" if "host" in headers else INSIDE
    assert told(headers, trusted="10.0.0.1")[1] == own
    assert told(headers, public_url="https://public.example/x")[1] == "https://public.example/x"


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ('for="[2001:db8::7]:4711";proto=https', "2001:db8::7"),
        ('for=6.6.6.6, For="9.9.9.9:80";by=_x, for=127.0.0.1', "9.9.9.9"),
        (r'for="_a\"b"', '_a"b'),
        ("proto=https", PROXY),
        ("for=9.9.9.9;;", PROXY),
    ],
)
def test_the_standard_header_names_the_client_as_well(forwarded: str, client: str) -> None:
    assert told({"forwarded": forwarded})[0] == client


def test_a_link_to_an_image_leads_through_the_proxy(server: Running) -> None:
    body = {"prompt": "ship", "seed": 7, "response_format": "url", "quality": "low"}
    reply = server.client.post("/v1/images/generations", json=body, headers=HEADERS)
    url = reply.json()["data"][0]["url"]
    assert url.startswith("https://img.example/dd/images/dd1.")
    path = url.removeprefix("https://img.example/dd")  # which a proxy takes off
    assert server.client.get(path, headers=HEADERS).headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("settings", "headers", "base"),
    [
        ({}, {}, ""),
        ({}, HEADERS, "https://img.example/dd"),
        ({"public_url": "https://public.example/x/"}, HEADERS, "https://public.example/x"),
        ({"trusted_proxies": ""}, HEADERS, ""),
    ],
)
def test_redirects_and_the_document_know_the_prefix(
    settings: dict[str, Any], headers: dict[str, str], base: str
) -> None:
    app = create_app(Settings(**settings), [])

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app, client=(PROXY, 1))
        async with httpx.AsyncClient(transport=transport, base_url=INSIDE, headers=headers) as asking:
            return await asking.get("/models/?a=b"), await asking.get("/openapi.json")

    redirect, document = asyncio.run(ask())
    assert redirect.headers["location"] == f"{base or INSIDE}/models?a=b"
    assert document.json().get("servers") == ([{"url": base}] if base else None)


def test_a_prefix_opens_no_way_around_the_keys(tmp_path: Any) -> None:
    """A prefix that is taken off the path for the router, but not for the check of keys, would."""
    (tmp_path / "keys").write_text("ops:0123456789abcdef\n")
    app = create_app(Settings(admin_keys_file=tmp_path / "keys", api_keys_file=tmp_path / "keys"), [])

    async def ask(path: str, prefix: str) -> int:
        transport = httpx.ASGITransport(app, client=(PROXY, 1))
        async with httpx.AsyncClient(transport=transport, base_url=INSIDE) as asking:
            return (await asking.post(path, headers={"x-forwarded-prefix": prefix}, json={})).status_code

    for path, prefix in (
        ("/static/admin/models", "/static"),
        ("/admin/models", "/static"),
        ("/dd/generate", "/dd"),
    ):
        assert asyncio.run(ask(path, prefix)) in (401, 404, 405), path
    assert asyncio.run(ask("/admin/models", "/admin")) == 401


@pytest.mark.parametrize("value", ["img.example", "ftp://img.example", "https://a.example/?q", "https://"])
def test_a_public_url_is_an_address(value: str) -> None:
    with pytest.raises(Exception, match="DD_SERVER_PUBLIC_URL"):
        load_settings(public_url=value)
    assert load_settings(public_url="https://[::1]:8443/a/").public_url == "https://[::1]:8443/a"
