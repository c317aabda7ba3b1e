"""Metrics by the conventions."""

from __future__ import annotations

import itertools

from prometheus_client.parser import text_string_to_metric_families

from dd_core.plan import Preset, few_steps, hybrid, one_step, onestep, teacher
from server.observability.metrics import FORMATS, OUTCOMES, SECONDS, UNKNOWN, Metrics

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
    metrics.request("tiny", "dd-1", "ok", 0.004)
    metrics.executed("tiny", "student", 3, 0.01)
    families = {f.name: f for f in text_string_to_metric_families(metrics.exposition().decode())}
    ours = [name for name in families if not name.startswith("process_")]
    assert ours
    assert all(name.startswith("dd_") for name in ours)
    buckets = [
        float(s.labels["le"]) for s in families["dd_batch_execution_seconds"].samples if "bucket" in s.name
    ]
    assert min(buckets) == SECONDS[0] == 0.002
    actors = {s.labels["actor"] for s in families["dd_batch_execution_seconds"].samples}
    assert actors == {"student", "teacher", "marginal", "decode"}
    counted = [s for s in families["dd_requests"].samples if s.name.endswith("_total") and s.value == 1]
    assert [s.labels for s in counted] == [{"model": "tiny", "plan": "dd-1", "outcome": "ok"}]


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
    for plan, outcome in itertools.product([*offered, UNKNOWN], OUTCOMES):
        if (plan, outcome) != (UNKNOWN, "ok"):
            metrics.request("tiny", plan, outcome, 0.1)
            metrics.request(UNKNOWN, UNKNOWN, "invalid", 0.1)
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
