"""Every reply is counted once, by its route, method and status, whoever gave it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as PrometheusCounter
from starlette.routing import Mount, Route

from server.app import create_app
from server.observability.metrics import ROUTES
from server.observability.traffic import CLIENT_LEFT, UNKNOWN, Traffic
from server.settings import Settings
from tests.server.helpers import OK, Running, eventually, running
from tests.server.middleware.sockets import CHUNKED, connected, rest, say, statuses

KEY = {"x-api-key": "alice-0123456789abcdef"}
Replies = Counter[tuple[str, str, str]]


async def nothing(request: object) -> None: ...


@pytest.fixture
def replies() -> PrometheusCounter:
    return PrometheusCounter("replies", "Replies.", ["route", "method", "code"], registry=CollectorRegistry())


def test_a_path_is_counted_as_its_template(replies: PrometheusCounter) -> None:
    traffic = Traffic(replies)
    traffic.bind(
        [Route("/models", nothing), Route("/v1/models/{name:path}", nothing), Mount("/static", nothing)]
    )
    paths = ["/models", "/v1/models/a/b", "/static/a.js", "/models/", "/wp-login.php", "/static"]
    templates = ["/models", "/v1/models/{name}", "/static/{path}", UNKNOWN, UNKNOWN, UNKNOWN]
    assert [traffic.template(path) for path in paths] == templates


def test_what_clients_make_up_adds_no_series(replies: PrometheusCounter) -> None:
    traffic = Traffic(replies)
    for number in range(100):
        traffic.count(f"METHOD{number}", f"/{number}", 404)
    [family] = replies.collect()
    shown = {tuple(s.labels.values()): s.value for s in family.samples if s.value}
    assert shown == {(UNKNOWN, "other", "404"): 100}


def _replies(live: Running) -> Replies:
    samples = (s for family in live.state.metrics.http_requests.collect() for s in family.samples)
    return Counter({(s.labels["route"], s.labels["method"], s.labels["code"]): int(s.value) for s in samples})


def test_every_reply_that_is_documented_has_its_series_before_the_first_one() -> None:
    app = create_app(Settings())
    [family] = app.state.dd.metrics.http_requests.collect()
    made = {(s.labels["route"], s.labels["method"].lower(), s.labels["code"]) for s in family.samples}
    documented = {
        (path, method, code)
        for path, methods in app.openapi()["paths"].items()
        for method, operation in methods.items()
        for code in operation["responses"]
        if code != "422"  # FastAPI's own, which no handler answers
    }
    assert len(documented) > 30
    assert documented <= made
    assert {(route, "post", str(CLIENT_LEFT)) for route in ROUTES[:2]} <= made
    assert set(ROUTES) <= {route for route, _, _ in made}


@pytest.fixture(scope="module")
def live(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice:{KEY['x-api-key']}", encoding="ascii")
    settings = {
        "max_connections": 4,
        "max_body_bytes": 1000,
        "receive_timeout": 0.5,
        "max_header_bytes": 1024,
    }
    with running(bundle_folder, warmup=False, api_keys_file=keys, **settings) as found:
        yield found


def counted(live: Running, before: Replies, *expected: tuple[str, str, int]) -> None:
    """Wait until exactly these replies have been counted since `before`."""
    wanted = Counter((route, method, str(code)) for route, method, code in expected)
    eventually(lambda: +(_replies(live) - before) == wanted, f"{wanted} and not {_replies(live) - before}")


def test_replies_of_routes_and_of_the_middleware(live: Running) -> None:
    before = _replies(live)
    ask = live.client.request
    made = ask("POST", "/generate", json=OK, headers=KEY)
    receipt = made.json()["images"][0]["receipt"]
    path = f"/images/{receipt}"
    etag = ask("GET", path, headers=KEY).headers["etag"]
    codes = [
        ask("GET", path, headers={**KEY, "if-none-match": etag}).status_code,
        ask("HEAD", path, headers=KEY).status_code,
        ask("POST", "/generate", json=OK).status_code,
        ask("POST", "/generate", json={**OK, "steps": 0}, headers=KEY).status_code,
        ask("POST", "/generate", content=b" " * 2000, headers=KEY).status_code,
        ask("PUT", "/generate", headers=KEY).status_code,
        ask("GET", "/nowhere", headers=KEY).status_code,
        ask("GET", "/static/style.css").status_code,
        ask("GET", "/readyz").status_code,
    ]
    assert [made.status_code, *codes] == [200, 304, 200, 401, 400, 413, 405, 404, 200, 200]
    counted(
        live,
        before,
        ("/generate", "POST", 200),
        ("/images/{receipt}", "GET", 200),
        ("/images/{receipt}", "GET", 304),
        ("/images/{receipt}", "HEAD", 200),
        ("/generate", "POST", 401),
        ("/generate", "POST", 400),
        ("/generate", "POST", 413),
        ("/generate", "PUT", 405),
        (UNKNOWN, "GET", 404),
        ("/static/{path}", "GET", 200),
        ("/readyz", "GET", 200),
    )
    ok = {"outcome": "ok", "model": "tiny"}
    assert live.metric("dd_requests_total", route="/images/{receipt}", **ok) == 1
    assert live.metric("dd_request_duration_seconds_count", route="/images/{receipt}", **ok) == 1


def test_replies_of_the_connection(live: Running) -> None:
    before = _replies(live)
    key = f"x-api-key: {KEY['x-api-key']}\r\n".encode()
    body = b"POST /generate HTTP/1.1\r\nhost: x\r\n" + key + b"content-length: 50\r\n\r\n{"
    said = [
        say(live, b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"x" * 2000 + b"\r\n\r\n"),
        say(live, b"not HTTP\r\n\r\n"),
        say(live, body),  # its body never comes
        say(live, CHUNKED.replace(b"\r\n\r\n", b"\r\n" + key + b"\r\n") + b"no length\r\n"),
    ]
    assert [statuses(reply) for reply in said] == [[431], [400], [408], [400]]
    counted(
        live,
        before,
        (UNKNOWN, UNKNOWN, 431),
        (UNKNOWN, UNKNOWN, 400),
        ("/generate", "POST", 408),
        ("/generate", "POST", 400),
    )


def test_a_connection_too_many(live: Running) -> None:
    live.client.get("/readyz")  # so that its connection is there
    before = _replies(live)
    crowded = live.metric("dd_rejects_total", reason="too_many_connections")
    with ExitStack() as opened:
        sockets = [opened.enter_context(connected(live)) for _ in range(4)]
        assert statuses(rest(sockets[-1])) == [503]
        counted(live, before, (UNKNOWN, UNKNOWN, 503))
    assert live.metric("dd_rejects_total", reason="too_many_connections") == crowded + 1


def test_a_server_shows_its_devices_start_and_models(live: Running) -> None:
    assert live.metric("dd_devices", state="up") == 1
    assert live.metric("dd_devices", state="replacing") == 0
    assert live.metric("dd_queue_capacity_images") == live.state.settings.queue_size
    assert live.metric("dd_backlog_seconds", device="cpu:0") == 0
    assert live.metric("dd_device_busy_seconds_total", device="cpu:0") > 0
    assert live.metric("dd_worker_resident_memory_bytes", device="cpu:0") > 10e6
    assert live.metric("dd_startup_seconds", phase="load") > 0
    model = live.state.catalog.models["tiny"]
    assert live.metric("dd_model_info", model="tiny", weights=model.manifest.digest) == 1
    assert live.metric("dd_model_load_seconds", model="tiny") > 0
