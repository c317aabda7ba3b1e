"""Every metric and every bucket, in one place.

Prefix `dd_`, base units, no label without a bound: models and plans come from the loaded bundles,
routes from the application, outcomes and reasons from the tuples below, formats from the contract.
Children are kept, because `.labels()` on each request costs as much as the observation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import prometheus_client as prometheus
from prometheus_client.exposition import choose_encoder

from dd_core.plan import Preset
from distilled_decoding.contract import ImageFormat
from server import errors
from server.observability.processes import ProcessUsage
from server.observability.traffic import UNKNOWN, Traffic
from server.scheduling.costs import Kind

# Otherwise every counter and histogram gets a second series with the time of its making.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]

# From 2 ms: the first bucket of the usual servers (0.3 s) hides everything that one step does.
SECONDS = (
    *(0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1, 2.5, 5, 10, 30, 60, 120, 300),
)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OUTCOMES = ("ok", "invalid", "rejected", "deadline", "canceled", "error", "oom")
FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
# Of the requests for images, which have a model and a plan.
ROUTES = ("/generate", "/v1/images/generations", "/images/{receipt}")
# Refusals that are none of the client's doing: it may come again, and had better come to another replica.
REJECTIONS = (
    errors.QueueFullError,
    errors.DeadlineUnreachableError,
    errors.UnavailableError,
    errors.CrowdedError,
)
REASONS = (*(error.code for error in REJECTIONS), errors.DrainingError.code)
DEVICE_STATES = ("up", "replacing")
STARTUP_PHASES = ("find", "processes", "load", "warmup")


def package_version() -> str:
    """The installed version, or `unknown` when run from a checkout that is not installed."""
    try:
        return version("distilled-decoding")
    except PackageNotFoundError:
        return "unknown"


def _labels(metric: Any, *values: str) -> Any:
    return metric.labels(*values)


class Metrics:
    """The server's metrics, in a registry of their own so that two apps never share counts."""

    def __init__(self) -> None:
        registry = self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        counter = partial(prometheus.Counter, registry=registry)
        gauge = partial(prometheus.Gauge, registry=registry)
        histogram = partial(prometheus.Histogram, registry=registry)
        seconds = partial(histogram, buckets=SECONDS)
        request = ["route", "model", "plan", "outcome"]
        self.http_requests = counter(
            "dd_http_requests_total",
            "Replies to requests and refused connections, by route, method and status.",
            ["route", "method", "code"],
        )
        self.traffic = Traffic(self.http_requests)
        self._requests = counter("dd_requests_total", "Generate requests by outcome.", request)
        self._duration = seconds(
            "dd_request_duration_seconds",
            "From a generate request's arrival until its reply is made, or its stream ends.",
            request,
        )
        self._rejects = counter(
            "dd_rejects_total",
            "Requests for images, and connections, that were turned away, by the error's code.",
            ["reason"],
        )
        self._images = counter("dd_images_total", "Images encoded for a reply.", ["model", "plan"])
        self.queue_wait = seconds(
            "dd_queue_wait_seconds",
            "Time that a request, a step of its stream or its part for one of several devices, waited for a "
            "device.",
        )
        self._execution = seconds(
            "dd_batch_execution_seconds",
            "Device time of one forward pass over a batch, by actor, and of decoding.",
            ["model", "actor"],
        )
        self.batch_size = histogram(
            "dd_batch_size", "Images that shared a forward pass.", buckets=BATCH_SIZES
        )
        self._encode = seconds(
            "dd_encode_seconds",
            "Time to encode images of a request: all of a reply, or one of a stream.",
            ["format"],
        )
        self.text_encode = seconds(
            "dd_text_encode_seconds", "Time that the prompts which are new in a pass took to encode."
        )
        self.first_preview = seconds(
            "dd_time_to_first_preview_seconds",
            "From the arrival of a request for a stream to its first picture.",
        )
        self._downgrades = counter(
            "dd_plan_downgrades_total",
            "Requests that got a cheaper plan than on an idle server.",
            ["requested", "applied"],
        )
        self.discarded = counter(
            "dd_discarded_compute_seconds_total",
            "Device time spent on images that nobody waited for any more, shared out by image.",
        )
        self.queue_depth = gauge("dd_queue_depth", "Images that wait for the device.")
        self.queue_capacity = gauge("dd_queue_capacity_images", "Most images that wait; beyond it 429.")
        self.backlog = gauge(
            "dd_backlog_seconds", "Estimated time until a device has done all that waits for it.", ["device"]
        )
        self.device_busy = counter(
            "dd_device_busy_seconds_total",
            "Time that a device was at a pass: from its sending, or the answer before, to its answer.",
            ["device"],
        )
        self.devices = gauge("dd_devices", "Device processes by state.", ["state"])
        self._device_memory = gauge(
            "dd_device_memory_bytes",
            "Memory of a GPU: of tensors, of PyTorch's allocator, free and in all.",
            ["device", "kind"],
        )
        self.processes = ProcessUsage()
        registry.register(self.processes)
        self.worker_restarts = counter(
            "dd_worker_restarts_total", "Device processes that died and were replaced.", ["device"]
        )
        self.worker_recovery = seconds(
            "dd_worker_recovery_seconds",
            "From the death of a device process to the next one with its models loaded.",
        )
        self.inflight = gauge("dd_inflight_requests", "Generate requests being handled.")
        self.ready = gauge("dd_ready", "1 when warmed up and accepting.")
        self._startup = gauge(
            "dd_startup_seconds", "Time that each phase of the start took, all models together.", ["phase"]
        )
        self._model_load = gauge(
            "dd_model_load_seconds", "Time that the newest load of a model took, with its warm-up.", ["model"]
        )
        self._model_info = gauge("dd_model_info", "Constant 1 of each loaded model.", ["model", "weights"])
        gauge("dd_build_info", "Constant 1, labelled with the version.", ["version"]).labels(
            package_version()
        ).set(1)
        self._labels: Callable[..., Any] = lru_cache(maxsize=None)(_labels)
        for metric, names in (
            (self._encode, FORMATS),
            (self._rejects, REASONS),
            (self.devices, DEVICE_STATES),
            (self._startup, STARTUP_PHASES),
        ):
            for name in names:
                self._labels(metric, name)
        self.bind(UNKNOWN, ())

    def bind(self, model: str, presets: Sequence[Preset]) -> None:
        """Make the series of a loaded model, so that they exist before its first request."""
        plans = [preset.plan for preset in presets]
        names = [plan.name for plan in plans]
        offered = sorted((p.plan for p in presets if p.offered), key=lambda plan: plan.cost)
        for applied, requested in itertools.combinations(offered, 2):
            self._labels(self._downgrades, requested.name, applied.name)
        for route, name, outcome in itertools.product(ROUTES, (UNKNOWN, *names), OUTCOMES):
            self._labels(self._requests, route, model, name, outcome)
        for name in names:
            self._labels(self._images, model, name)
        for route, plan in itertools.product(ROUTES, offered):
            self._labels(self._duration, route, model, plan.name, "ok")
        for actor in ("decode", *sorted({actor for plan in plans for actor in plan.needs})) if plans else ():
            self._labels(self._execution, model, actor)

    def loaded(self, model: str, weights: str, seconds: float) -> None:
        """Show a model that is served from now on, and the time that its load took."""
        self._model_info.labels(model, weights).set(1)
        self._model_load.labels(model).set(seconds)

    def unloaded(self, model: str, weights: str) -> None:
        """Show a model no more; its counts stay."""
        self._model_info.remove(model, weights)
        self._model_load.remove(model)

    def started(self, phase: str, seconds: float) -> None:
        """Add to the time of a phase of `STARTUP_PHASES`."""
        self._labels(self._startup, phase).inc(seconds)

    def device_memory(self, device: str, memory: Mapping[str, int]) -> None:
        """Show the memory of a device in bytes, by kind; of a CPU there is none to show."""
        for kind, count in memory.items():
            self._labels(self._device_memory, device, kind).set(count)

    def request(
        self, route: str, model: str, plan: str, outcome: str, seconds: float, trace_id: str | None = None
    ) -> None:
        """Count one request for images; its trace is the exemplar of its bucket."""
        self._labels(self._requests, route, model, plan, outcome).inc()
        # Of other outcomes made on first use: 20 lines of exposition for each add up.
        exemplar = None if trace_id is None else {"trace_id": trace_id}
        self._labels(self._duration, route, model, plan, outcome).observe(seconds, exemplar)

    def rejected(self, error: BaseException) -> None:
        """Count a request or connection that was turned away; other errors are not counted."""
        if isinstance(error, REJECTIONS):
            self._labels(self._rejects, error.code).inc()

    def downgraded(self, requested: str, applied: str) -> None:
        """Count a request that got a cheaper plan; both are names of loaded models' plans."""
        self._labels(self._downgrades, requested, applied).inc()

    def encoded(self, model: str, plan: str, images: int) -> None:
        """Count images that were encoded for a reply, whether or not their client still reads it."""
        self._labels(self._images, model, plan).inc(images)

    def encode_seconds(self, image_format: str, seconds: float) -> None:
        """Observe the time of images that were encoded together."""
        self._labels(self._encode, image_format).observe(seconds)

    def executed(self, model: str, actor: Kind, images: int, seconds: float) -> None:
        """Count a batch, or the decoding after it."""
        self._labels(self._execution, model, actor).observe(seconds)
        if actor != "decode":
            self.batch_size.observe(images)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics and their media type: OpenMetrics, which has exemplars, where `accept` asks for
        it, else Prometheus' text format.
        """
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type
