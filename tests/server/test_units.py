"""Budgets, settings, images and metrics by themselves."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from dd_core.errors import InvalidPlanError, InvalidRequestError
from dd_core.plan import Preset, few_steps, hybrid, one_step, onestep, teacher
from server.errors import BadRequestError
from server.generation.encoder import encode
from server.models.budgets import BudgetTable
from server.observability.metrics import SECONDS, Metrics
from server.settings import Settings, load_settings

PRESETS = (
    Preset(one_step(64), fid=40.0),
    Preset(few_steps(64, 20), fid=35.0),
    Preset(hybrid(64, 10, 20), fid=36.0),
    Preset(teacher(64), fid=30.0),
    Preset(onestep(64), fid=1.0, offered=False),
)


@pytest.mark.parametrize(
    ("steps", "plan"), [(1, "dd-1"), (2, "dd-2"), (3, "dd-2"), (12, "dd-2"), (63, "dd-2"), (64, "teacher")]
)
def test_a_budget_gets_the_best_measured_plan_that_fits(steps: int, plan: str) -> None:
    """Not the dearest: pre-trained-11-21 costs 12 passes, but was measured worse than two steps."""
    assert BudgetTable(PRESETS).pick(steps).plan.name == plan


@pytest.mark.parametrize("steps", [0, -1, 65, 10**9, 10**400])
def test_a_budget_out_of_range_is_refused_with_the_range(steps: int) -> None:
    with pytest.raises(BadRequestError, match="from 1 to 64") as caught:
        BudgetTable(PRESETS).pick(steps)
    assert caught.value.param == "steps"
    assert len(caught.value.message) < 120


def test_ranges_cover_every_budget_once() -> None:
    ranges = BudgetTable(PRESETS).ranges
    assert [(r.first, r.last, r.preset.plan.name) for r in ranges] == [
        (1, 1, "dd-1"),
        (2, 63, "dd-2"),
        (64, 64, "teacher"),
    ]


def test_a_model_that_offers_nothing_is_refused() -> None:
    with pytest.raises(InvalidPlanError):
        BudgetTable([Preset(onestep(64), offered=False)])


@pytest.fixture
def pixels() -> np.ndarray:
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), -1).copy()


def test_png_is_exact_and_repeats(pixels: np.ndarray) -> None:
    data = encode(pixels, "png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert encode(pixels, "png") == data


@pytest.mark.parametrize(("name", "pillow"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats_stay_close(pixels: np.ndarray, name: str, pillow: str) -> None:
    image = Image.open(io.BytesIO(encode(pixels, name)))  # type: ignore[arg-type]
    assert image.format == pillow
    assert image.size == (32, 32)
    error = np.abs(np.asarray(image.convert("RGB"), dtype=int) - pixels)
    assert error.mean() < 3


def test_settings_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_SERVER_PORT", "9001")
    monkeypatch.setenv("DD_SERVER_MAX_BATCH", "7")
    settings = load_settings(port=9002, max_batch=None)
    assert (settings.port, settings.max_batch) == (9002, 7)


def test_a_kubernetes_service_link_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service named dd-server makes Kubernetes set DD_SERVER_PORT=tcp://… in every pod."""
    monkeypatch.setenv("DD_SERVER_PORT", "tcp://10.0.0.1:8000")
    assert load_settings().port == 8000


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70000), ("max_batch", 0), ("log_level", "loud"), ("queue_size", 3), ("drain_timeout", -1)],
)
def test_a_bad_setting_names_itself(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        load_settings(**{name: value})


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_metrics_follow_the_conventions() -> None:
    metrics = Metrics()
    metrics.bind("tiny", [preset.plan for preset in PRESETS])
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
