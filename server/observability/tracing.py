"""Traces by OpenTelemetry, where `--otel-endpoint` asks for them: a span for every request.

Starlette's middleware makes the span (names and attributes by the semantic conventions, the parent
from `traceparent`); ours adds the request's context to it. The SDK and the exporter are the extra
`otel` and are imported here alone, and only when they are asked for.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dd_core.errors import InvalidRequestError
from server.observability.context import PROBES, context_of
from server.observability.logs import shown_path
from server.observability.metrics import package_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_UNTRACED = (rf"^https?://[^/]*(?:{'|'.join(sorted(PROBES))}|/static/.*)$",)
# Seconds that the last spans get at the end, whether the collector answers or not.
_FLUSH_SECONDS = 5.0


def require_sdk() -> None:
    """Nothing, if spans could be made and sent.

    Raises:
        InvalidRequestError: the extra `otel` is not installed.
    """
    try:
        importlib.import_module("opentelemetry.sdk.trace")
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        importlib.import_module("starlette.middleware.opentelemetry")
    except ImportError as error:
        raise InvalidRequestError(
            f"otel_endpoint needs OpenTelemetry, which is not installed ({error.name or error} is missing): "
            "pip install 'distilled-decoding[otel]'",
            param="otel_endpoint",
        ) from None


def make_provider(endpoint: str) -> TracerProvider:
    """A provider that sends spans to the OTLP/HTTP collector at `endpoint`, in the background.

    What is not set here (sampling, headers, time limits) follows OpenTelemetry's own `OTEL_*`.

    Raises:
        InvalidRequestError: the extra `otel` is not installed.
    """
    require_sdk()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", "dd-server")
    resource = Resource.create({"service.name": name, "service.version": package_version()})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    url = endpoint.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


def add_tracing(app: FastAPI, provider: TracerProvider) -> None:
    """Make a span of `provider` around everything that `app` does for a request."""
    from starlette.middleware.opentelemetry import OpenTelemetryMiddleware

    app.add_middleware(SpanFields, provider=provider)
    app.add_middleware(OpenTelemetryMiddleware, tracer_provider=provider, excluded_urls=_UNTRACED)


class SpanFields:
    """Put a request's id and context on its span (`dd.model`, …), and the trace's id into its context.

    At the end of the application it sends what has not been sent, for a bounded time.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        from opentelemetry import trace

        self.app = app
        self.provider = provider
        self.trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        span = self.trace.get_current_span()
        if not span.is_recording():
            await self.app(scope, receive, send)
            return
        context = context_of(scope)
        context["trace_id"] = self.trace.format_trace_id(span.get_span_context().trace_id)
        try:
            await self.app(scope, receive, send)
        finally:
            noted = {name: value for name, value in context.items() if name != "trace_id"}
            noted["request_id"] = scope["state"]["request_id"]
            span.set_attributes({f"dd.{name}": value for name, value in noted.items()})
            span.set_attribute("url.path", shown_path(scope["path"]))
            span.set_attribute("url.query", "")  # the page's holds the prompt

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def flushed_first(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown"):
                last = threading.Thread(target=self.provider.shutdown, daemon=True)
                last.start()
                await asyncio.to_thread(last.join, _FLUSH_SECONDS)
            await send(message)

        await self.app(scope, receive, flushed_first)
