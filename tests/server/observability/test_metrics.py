"""Metrics by the conventions."""

from __future__ import annotations

import itertools

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dd_core.plan import Preset, few_steps, hybrid, one_step, onestep, teacher
from server.errors import (
    CrowdedError,
    DeadlineUnreachableError,
    DeviceKilledError,
    DrainingError,
    QueueFullError,
    UnavailableError,
)
from server.observability.metrics import FORMATS, OUTCOMES, REASONS, ROUTES, SECONDS, STARTUP_PHASES, Metrics
from server.observability.traffic import UNKNOWN

PRESETS = (
    Preset(one_step(64), fid=40.0),
    Preset(few_steps(64, 20), fid=35.0),
    Preset(hybrid(64, 10, 20), fid=36.0),
    Preset(teacher(64), fid=30.0),
    Preset(onestep(64), fid=1.0, offered=False),
)


def test_metrics_follow_the_conventions() -> None:
    metrics = Metrics()
    metrics.bind("tiny", PRESETS)
    metrics.request("/generate", "tiny", "dd-1", "ok", 0.004)
    metrics.executed("tiny", "student", 3, 0.01)
    families = {f.name: f for f in text_string_to_metric_families(metrics.exposition()[0].decode())}
    ours = [name for name in families if not name.startswith("process_")]
    assert ours
    assert all(name.startswith("dd_") for name in ours)
    buckets = [
        float(s.labels["le"]) for s in families["dd_batch_execution_seconds"].samples if "bucket" in s.name
    ]
    assert min(buckets) == SECONDS[0] == 0.002
    assert sorted(set(buckets))[-2] == SECONDS[-1] == 300, "a teacher on a CPU takes minutes"
    actors = {s.labels["actor"] for s in families["dd_batch_execution_seconds"].samples}
    assert actors == {"student", "teacher", "marginal", "decode"}
    counted = [s for s in families["dd_requests"].samples if s.name.endswith("_total") and s.value == 1]
    assert [s.labels for s in counted] == [
        {"route": "/generate", "model": "tiny", "plan": "dd-1", "outcome": "ok"}
    ]


def test_a_downgrade_can_be_seen_before_the_first_one() -> None:
    """A rate over a series that begins with its first event misses that event."""
    metrics = Metrics()
    metrics.bind("tiny", PRESETS)
    found = {
        (s.labels["requested"], s.labels["applied"])
        for family in metrics.registry.collect()
        for s in family.samples
        if s.name == "dd_plan_downgrades_total"
    }
    assert ("teacher", "dd-1") in found and ("dd-2", "dd-1") in found
    assert ("dd-1", "dd-2") not in found and not any("onestep" in pair for pair in found)


def series(metrics: Metrics) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    return {(s.name, frozenset(s.labels.items())) for s in samples if not s.name.startswith("process_")}


def test_every_series_exists_before_its_first_event() -> None:
    """But the durations of requests that were not answered: a rate of them is nobody's."""
    metrics = Metrics()
    metrics.bind("tiny", PRESETS)
    before = series(metrics)
    offered = [preset.plan.name for preset in PRESETS if preset.offered]
    for route, plan, outcome in itertools.product(ROUTES, [*offered, UNKNOWN], OUTCOMES):
        if (plan, outcome) != (UNKNOWN, "ok"):
            metrics.request(route, "tiny", plan, outcome, 0.1)
            metrics.request(route, UNKNOWN, UNKNOWN, "invalid", 0.1)
    for error in (QueueFullError, DeadlineUnreachableError, UnavailableError, DrainingError, CrowdedError):
        metrics.rejected(error("later", retry_after=1))
    for phase in STARTUP_PHASES:
        metrics.started(phase, 0.1)
    for plan in offered:
        metrics.encoded("tiny", plan, 1)
    for requested, applied in (("teacher", "dd-2"), ("dd-2", "dd-1")):
        metrics.downgraded(requested, applied)
    for image_format in FORMATS:
        metrics.encode_seconds(image_format, 0.1)
    for actor in ("student", "teacher", "marginal", "decode"):
        metrics.executed("tiny", actor, 1, 0.1)
    for name, labels in series(metrics) - before:
        assert name.startswith("dd_request_duration_seconds") and dict(labels)["outcome"] != "ok"


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_only_what_is_turned_away_for_no_fault_of_its_own_is_a_reject() -> None:
    metrics = Metrics()
    metrics.rejected(QueueFullError("full", retry_after=1))
    metrics.rejected(DeviceKilledError("killed", retry_after=1))  # it was taken, and failed
    metrics.rejected(ValueError("a bug"))
    counted = {reason: value(metrics, "dd_rejects_total", reason=reason) for reason in REASONS}
    assert counted == {**dict.fromkeys(REASONS, 0.0), "queue_full": 1.0}


def test_a_model_is_shown_while_it_is_loaded() -> None:
    metrics = Metrics()
    metrics.loaded("tiny", "0123abcd", 2.5)
    assert value(metrics, "dd_model_info", model="tiny", weights="0123abcd") == 1
    assert value(metrics, "dd_model_load_seconds", model="tiny") == 2.5
    metrics.unloaded("tiny", "0123abcd")
    assert value(metrics, "dd_model_info", model="tiny", weights="0123abcd") is None
    assert value(metrics, "dd_model_load_seconds", model="tiny") is None


def test_the_memory_of_a_gpu_is_shown_as_it_was_last_read() -> None:
    metrics = Metrics()
    metrics.device_memory("cuda:0", {"allocated": 1, "total": 80})
    metrics.device_memory("cuda:0", {"allocated": 2, "total": 80})
    metrics.device_memory("cpu:0", {})
    shown = [
        ({**s.labels}, s.value)
        for family in metrics.registry.collect()
        for s in family.samples
        if family.name == "dd_device_memory_bytes"
    ]
    assert shown == [
        ({"device": "cuda:0", "kind": "allocated"}, 2),
        ({"device": "cuda:0", "kind": "total"}, 80),
    ]


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_trace_is_the_exemplar_of_its_bucket_where_openmetrics_is_asked_for() -> None:
    metrics = Metrics()
    metrics.request("/generate", "tiny", "dd-1", "ok", 0.004, TRACE)
    metrics.request("/generate", "tiny", "dd-1", "ok", 20.0)
    text, media_type = metrics.exposition("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert media_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in openmetrics(text.decode())}
    marked = {
        s.labels["le"]: s.exemplar.labels
        for s in families["dd_request_duration_seconds"].samples
        if s.exemplar is not None
    }
    assert marked == {"0.005": {"trace_id": TRACE}}
    plain, media_type = metrics.exposition("text/plain")
    assert media_type.startswith("text/plain")
    assert TRACE.encode() not in plain
