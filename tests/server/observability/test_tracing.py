"""Traces: a span for every request, with its facts; and nothing of it where nobody asked."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi import FastAPI, Request
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from dd_core.errors import InvalidRequestError
from server.app import create_app
from server.models.catalog import find
from server.observability.context import context_of
from server.observability.tracing import add_tracing, make_provider
from server.settings import Settings, load_settings
from tests.server.helpers import OK, running
from tests.server.test_cli import ROOT, Run
from tests.server.test_cli import run as run

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine-1"}


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(bundle_folder: Path, spans: InMemorySpanExporter) -> FastAPI:
    """The application with spans kept in memory, and two routes more."""
    app = create_app(Settings(), [find(bundle_folder)])

    async def facts(request: Request) -> None:
        context_of(request.scope).update(model="tiny", plan="dd-1", steps=1, n=2, outcome="ok", queue_ms=0.5)

    async def broken() -> None:
        raise ZeroDivisionError("secret")

    app.add_api_route("/facts/{name}", facts)
    app.add_api_route("/broken", broken)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    add_tracing(app, provider)
    return app


def get(app: FastAPI, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    replies = []

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            replies.append(await client.get(path, headers=headers))

    anyio.run(ask)
    return replies[0]


def the_span(spans: InMemorySpanExporter) -> ReadableSpan:
    [span] = spans.get_finished_spans()
    return span


def test_a_request_is_a_span_with_its_facts(traced: FastAPI, spans: InMemorySpanExporter) -> None:
    assert get(traced, "/facts/a", HEADERS).status_code == 200
    span = the_span(spans)
    assert (span.name, span.kind) == ("GET /facts/{name}", SpanKind.SERVER)
    expected = {
        "http.route": "/facts/{name}",
        "http.response.status_code": 200,
        "dd.request_id": "mine-1",
        "dd.model": "tiny",
        "dd.plan": "dd-1",
        "dd.steps": 1,
        "dd.n": 2,
        "dd.outcome": "ok",
        "dd.queue_ms": 0.5,
    }
    assert expected.items() <= dict(span.attributes or {}).items()


def test_the_callers_trace_goes_on(traced: FastAPI, spans: InMemorySpanExporter) -> None:
    get(traced, "/models", HEADERS)
    span = the_span(spans)
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)


@pytest.mark.parametrize("broken", ["", "00-short-b7ad6b7169203331-01", f"00-{'0' * 32}-{PARENT}-01"])
def test_a_broken_traceparent_begins_a_new_trace(
    traced: FastAPI, spans: InMemorySpanExporter, broken: str
) -> None:
    assert get(traced, "/models", {"traceparent": broken}).status_code == 503, "nothing is loaded here"
    assert the_span(spans).parent is None


def test_a_receipt_is_not_traced(traced: FastAPI, spans: InMemorySpanExporter) -> None:
    """It holds a prompt."""
    get(traced, "/images/dd1.secret")
    span = the_span(spans)
    assert span.name == "GET /images/{receipt}"
    assert "secret" not in span.to_json()


def test_a_prompt_in_the_page_s_address_is_not_traced(traced: FastAPI, spans: InMemorySpanExporter) -> None:
    get(traced, "/?prompt=a+secret")
    assert "secret" not in the_span(spans).to_json()


def test_a_bug_is_an_error(traced: FastAPI, spans: InMemorySpanExporter) -> None:
    assert get(traced, "/broken").status_code == 500
    span = the_span(spans)
    assert span.status.status_code is StatusCode.ERROR
    assert "secret" not in span.to_json()


def test_probes_are_not_traced(traced: FastAPI, spans: InMemorySpanExporter) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/static/app.js"):
        get(traced, path)
    assert spans.get_finished_spans() == ()


def test_the_log_line_names_the_trace(
    traced: FastAPI, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    get(traced, "/models", HEADERS)
    [record] = [record for record in caplog.records if record.name == "dd_server.access"]
    assert record.fields["trace_id"] == TRACE  # type: ignore[attr-defined]


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A collector on a real socket: its address, and what it was sent."""
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
def test_what_a_server_did_is_sent_before_it_ends(
    bundle_folder: Path, collector: tuple[str, list[ExportTraceServiceRequest]], suffix: str
) -> None:
    address, received = collector
    with running(bundle_folder, otel_endpoint=address + suffix, warmup=False) as live:
        live.post(OK, **HEADERS)
    [group] = [resource for request in received for resource in request.resource_spans]
    names = {attribute.key: attribute.value.string_value for attribute in group.resource.attributes}
    assert names["service.name"] == "dd-server"
    [span] = [span for scope in group.scope_spans for span in scope.spans]
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("POST /generate", TRACE, PARENT)


def test_a_collector_that_does_not_answer_does_not_hold_the_end(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter would go on trying for much longer; the end waits for a bounded time."""
    never, over, shutdown = threading.Event(), threading.Event(), TracerProvider.shutdown

    def stuck(provider: TracerProvider) -> None:
        never.wait(600)
        shutdown(provider)  # or its thread would go on trying beside other tests
        over.set()

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # nor is the end of the test held
    monkeypatch.setattr("server.observability.tracing._FLUSH_SECONDS", 0.1)
    monkeypatch.setattr(TracerProvider, "shutdown", stuck)
    with running(bundle_folder, otel_endpoint="http://127.0.0.1:9", warmup=False) as live:
        assert live.post(OK).status_code == 200
    never.set()
    assert over.wait(60)


def test_a_service_name_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "images-eu")
    provider = make_provider("http://127.0.0.1:9")
    assert provider.resource.attributes["service.name"] == "images-eu"
    provider.shutdown()


def test_asked_for_but_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Told before a model is loaded."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    code, _, error = run("serve", tmp_path / "none", "--port", 0, "--otel-endpoint", "http://127.0.0.1:4318")
    assert code == 2
    assert "pip install 'distilled-decoding[otel]'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("value", ["collector:4318", "ftp://collector", "http://", "http://a b"])
def test_an_endpoint_is_a_url(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="DD_SERVER_OTEL_ENDPOINT"):
        load_settings(otel_endpoint=value)


def test_nothing_is_imported_where_nobody_asked() -> None:
    """The interface (`opentelemetry.trace`) comes with FastAPI; the SDK and the exporter must not."""
    code = (
        "import json, sys; from server import launcher; from server.app import create_app; "
        "from server.settings import Settings; create_app(Settings()); print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    loaded = json.loads(done.stdout)
    assert not [name for name in loaded if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
    assert not {"google.protobuf", "requests", "starlette.middleware.opentelemetry"} & set(loaded)
