"""Every metric and every bucket, in one place.

Prefix `dd_`, base units, no label without a bound: models and plans come from the loaded bundles,
outcomes from the tuple below, formats from the contract. Children are kept, because `.labels()`
on each request costs as much as the observation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import prometheus_client as prometheus

from dd_core.plan import Preset
from distilled_decoding.contract import ImageFormat
from server.scheduling.costs import Kind

# Otherwise every counter and histogram gets a second series with the time of its making.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]

# From 2 ms: the first bucket of the usual servers (0.3 s) hides everything that one step does.
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OUTCOMES = ("ok", "invalid", "rejected", "deadline", "canceled", "error", "oom")
FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
# Label of a request that was refused before its model or plan was known.
UNKNOWN = "none"


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
        request = ["model", "plan", "outcome"]
        self._requests = counter("dd_requests_total", "Generate requests by outcome.", request)
        self._duration = seconds(
            "dd_request_duration_seconds",
            "From a generate request's arrival until its reply is made, or its stream ends.",
            request,
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
        self.worker_restarts = counter(
            "dd_worker_restarts_total", "Device processes that died and were replaced."
        )
        self.worker_recovery = seconds(
            "dd_worker_recovery_seconds",
            "From the death of a device process to the next one with its models loaded.",
        )
        self.inflight = gauge("dd_inflight_requests", "Generate requests being handled.")
        self.ready = gauge("dd_ready", "1 when warmed up and accepting.")
        gauge("dd_build_info", "Constant 1, labelled with the version.", ["version"]).labels(
            package_version()
        ).set(1)
        self._labels: Callable[..., Any] = lru_cache(maxsize=None)(_labels)
        for name in FORMATS:
            self._labels(self._encode, name)
        self.bind(UNKNOWN, ())

    def bind(self, model: str, presets: Sequence[Preset]) -> None:
        """Make the series of a loaded model, so that they exist before its first request."""
        plans = [preset.plan for preset in presets]
        names = [plan.name for plan in plans]
        offered = sorted((p.plan for p in presets if p.offered), key=lambda plan: plan.cost)
        for applied, requested in itertools.combinations(offered, 2):
            self._labels(self._downgrades, requested.name, applied.name)
        for name, outcome in itertools.product((UNKNOWN, *names), OUTCOMES):
            self._labels(self._requests, model, name, outcome)
        for name in names:
            self._labels(self._images, model, name)
        for plan in offered:
            self._labels(self._duration, model, plan.name, "ok")
        for actor in ("decode", *sorted({actor for plan in plans for actor in plan.needs})) if plans else ():
            self._labels(self._execution, model, actor)

    def request(self, model: str, plan: str, outcome: str, seconds: float) -> None:
        """Count one request for images."""
        self._labels(self._requests, model, plan, outcome).inc()
        # Of other outcomes made on first use: 20 lines of exposition for each add up.
        self._labels(self._duration, model, plan, outcome).observe(seconds)

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

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)
