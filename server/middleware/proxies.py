"""Client, scheme, host and prefix of a request, as the headers of a trusted proxy tell them.

    X-Forwarded-For     the client: the last address of the list that is no trusted proxy's
    X-Forwarded-Proto, -Host, -Port, -Prefix    what links begin with (`server.links`)
    Forwarded           the same in one header (RFC 7239), read where there is none of the above but -Prefix

Headers of others than trusted proxies are ignored. Of a list the first value counts, which is of the client's
own request. The prefix is never taken off a path, nor made the `root_path`: the path by which a route is
found is the one whose key was checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.links import base_url, moved, set_base

_MAPPED = IPv6Network("::ffff:0:0/96")
_HOST = re.compile(r"(?:[A-Za-z0-9._\-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?P<port>:\d{1,5})?")
_PORT = re.compile(r"\d{1,5}")
_PREFIX = re.compile(r"(?=.{1,255}$)(?:/[A-Za-z0-9._~!$&'()*+,;=:@%\-]+)+")
_PAIR = re.compile(r'\s*([\w!#$%&\'*+.^`|~\-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s",;]*))\s*([;,]|$)')
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_LONGEST_HOP = 64  # characters; an address is shorter, and a name, which RFC 7239 allows, is cut


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Parse an address without its scope; one that is mapped into IPv6 is the IPv4 address that it is."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped if address.version == 6 else None) or address


@lru_cache(4096)
def _plain(host: str) -> str:
    """Write an address in its usual form; what is none stays as it is."""
    return str(_address(host) or host)


class TrustedProxies:
    """Addresses and networks whose headers are believed; `*` is any."""

    def __init__(self, listed: str) -> None:
        entries = [part.strip() for part in listed.split(",") if part.strip()]
        self._any = "*" in entries
        networks = [ip_network(entry) for entry in entries if entry != "*"]
        self._networks = [
            ip_network(f"{found.network_address.ipv4_mapped}/{found.prefixlen - 96}")
            if isinstance(found, IPv6Network) and found.subnet_of(_MAPPED)
            else found
            for found in networks
        ]
        self._known = lru_cache(4096)(self._trusts)

    def __contains__(self, host: str | None) -> bool:
        return self._any or (host is not None and self._known(host))

    def _trusts(self, host: str) -> bool:
        address = _address(host)
        return address is not None and any(address in network for network in self._networks)


class _Said(NamedTuple):
    """Fields of a proxy's headers; empty = not there."""

    client: Sequence[str] = ()  # as the proxies appended them, with or without a port
    scheme: str = ""
    host: str = ""
    port: str = ""


class ProxyHeaders:
    """Take client, scheme, host and prefix of a request from the headers of a trusted proxy.

    Addresses in the scope are written as `_address` understands them, whoever they are of.
    """

    def __init__(self, app: ASGIApp, trusted: str, public_url: str) -> None:
        self.app = app
        self.trusted = TrustedProxies(trusted)
        self.public_url = public_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        for end in ("client", "server"):
            if scope.get(end):
                host, port = scope[end]
                scope[end] = (_plain(host), port)
        prefix, client = "", scope.get("client")
        said = [
            header for header in scope["headers"] if header[0].startswith((b"x-forwarded-", b"forwarded"))
        ]
        if said and (client[0] if client else None) in self.trusted:
            headers = Headers(raw=said)
            self._apply(scope, _said_by_x(headers) or _said_by_forwarded(headers) or _Said())
            prefix = _first(headers, "x-forwarded-prefix").rstrip("/")
        set_base(scope, self.public_url, prefix if _PREFIX.fullmatch(prefix) else "")
        await self.app(scope, receive, _redirecting(scope, send) if moved(scope) else send)

    def _apply(self, scope: Scope, said: _Said) -> None:
        """Put what a proxy says into a request's scope, unless it is malformed."""
        if said.client:
            scope["client"] = self._client(said.client)
        if said.scheme in _DEFAULT_PORTS:
            scope["scheme"] = said.scheme
        host = said.host if _HOST.fullmatch(said.host) else Headers(scope=scope).get("host", "")
        found = _HOST.fullmatch(host)
        if found is None:
            return
        usual = _DEFAULT_PORTS.get(scope["scheme"])
        if found["port"] is None and _PORT.fullmatch(said.port) and said.port != usual:
            host = f"{host}:{said.port}"
        scope["headers"] = list(scope["headers"])
        MutableHeaders(scope=scope)["host"] = host

    def _client(self, hops: Sequence[str]) -> tuple[str, int]:
        """Return the last hop that is no trusted proxy, or the first of all."""
        hosts = [_host_and_port(hop[:_LONGEST_HOP]) for hop in hops]
        host, port = next((hop for hop in reversed(hosts) if hop[0] not in self.trusted), hosts[0])
        return _plain(host), port


def _first(headers: Headers, name: str) -> str:
    return headers.get(name, "").partition(",")[0].strip()


def _said_by_x(headers: Headers) -> _Said | None:
    names = [f"x-forwarded-{name}" for name in ("for", "proto", "host", "port")]
    if not any(name in headers for name in names):
        return None
    hops = [hop.strip() for hop in ",".join(headers.getlist(names[0])).split(",")]
    scheme, host, port = (_first(headers, name) for name in names[1:])
    return _Said([hop for hop in hops if hop], scheme.lower(), host, port)


def _said_by_forwarded(headers: Headers) -> _Said | None:
    if "forwarded" not in headers:
        return None
    hops = _hops(",".join(headers.getlist("forwarded")))
    if not hops:
        return None
    scheme, host = (next((hop[name] for hop in hops if name in hop), "") for name in ("proto", "host"))
    return _Said([hop["for"] for hop in hops if hop.get("for")], scheme.lower(), host)


def _hops(forwarded: str) -> list[dict[str, str]]:
    """Parse the parameters of each hop of a `Forwarded` header; a malformed one has none."""
    hops: list[dict[str, str]] = [{}]
    position = 0
    while position < len(forwarded):
        pair = _PAIR.match(forwarded, position)
        if pair is None:
            return []
        value = pair[3] if pair[2] is None else re.sub(r"\\(.)", r"\1", pair[2])
        hops[-1].setdefault(pair[1].lower(), value)
        if pair[4] == ",":
            hops.append({})
        position = pair.end()
    return hops


def _host_and_port(text: str) -> tuple[str, int]:
    """Split `host`, `host:port`, `[host]` or `[host]:port`; anything else is a host as it stands."""
    if text.count(":") > 1 and not text.startswith("["):
        return text, 0
    host, _, port = text.removeprefix("[").partition("]" if text.startswith("[") else ":")
    port = port.removeprefix(":")
    return host, int(port) if _PORT.fullmatch(port) else 0


def _redirecting(scope: Scope, send: Send) -> Send:
    """Let redirects lead to where clients know the server."""

    async def moved_send(message: Message) -> None:
        if message["type"] == "http.response.start" and 300 <= message["status"] < 400:
            headers = MutableHeaders(raw=message["headers"])
            if "location" in headers:
                target = urlsplit(headers["location"])
                query = f"?{target.query}" if target.query else ""
                headers["location"] = base_url(scope) + target.path + query
        await send(message)

    return moved_send
