"""Readiness, `/models`, `/metrics`, the page's files and the interface's description."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import anyio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dd_core.errors import BundleNotFoundError, HashMismatchError, InvalidPlanError
from dd_core.manifest import read_manifest
from server.api.pages import STATIC
from server.app import create_app
from server.models.catalog import ServedModel
from server.settings import Settings
from server.state import Phase
from tests.server.helpers import Gate, Running, eventually, running


@pytest.mark.parametrize("path", ["/", "/docs", "/models.html", "/static/doc.css", "/favicon.ico"])
@pytest.mark.parametrize("asked", ["bytes=99999999-", "x", "bytes=0-3,5-6"])
def test_files_are_sent_whole(server: Running, path: str, asked: str) -> None:
    """Errors of ranges would have a shape of their own."""
    whole = server.client.get(path)
    part = server.client.get(path, headers={"range": asked})
    assert whole.status_code == part.status_code == 200 and whole.content == part.content


def test_ready_only_after_warm_up(bundle_folder: Path, gate: Gate) -> None:
    gate.open.clear()
    with running(bundle_folder, gate, ready=False) as live:
        assert live.client.get("/healthz").status_code == 200
        for reply in (live.client.get("/readyz"), live.post({"label": 0})):
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "not_ready"
            assert int(reply.headers["retry-after"]) >= 1
        assert live.metric("dd_ready") == 0
        gate.open.set()
        eventually(lambda: live.client.get("/readyz").status_code == 200, "ready")
        assert live.metric("dd_ready") == 1
        assert live.post({"label": 0}).status_code == 200


def test_warm_up_runs_every_size_of_batch(bundle_folder: Path, gate: Gate) -> None:
    """The student twice in every size of batch, from one image up.

    A size that seems to gain nothing is measured again, so on a busy machine it may come more than once.
    """
    with running(bundle_folder, gate, max_batch=4):
        sizes = [len(call) for call in gate.calls]
    assert sizes == sorted(sizes) and all(count % 2 == 0 for count in Counter(sizes).values())
    assert set(sizes) == {1, 2, 4}


def test_a_warm_up_that_fails_ends_the_server(
    bundle_folder: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.poisoned.value = 0
    with running(bundle_folder, gate, ready=False) as live:
        eventually(lambda: live.state.phase in (Phase.FAILED, Phase.DRAINING), "it fails")
        eventually(lambda: live.server.failure is not None, "and says so")
        assert live.server.should_exit
    assert "the warm-up of dd-1 failed" in caplog.text


def test_before_the_model_is_loaded_the_process_lives_but_is_not_ready() -> None:
    async def ask() -> None:
        transport = httpx.ASGITransport(create_app(Settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.get("/healthz")).status_code == 200
            for path in ("/readyz", "/models"):
                reply = await client.get(path)
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")

    anyio.run(ask)


def test_a_model_that_does_not_exist_stops_the_start() -> None:
    async def start() -> None:
        app = create_app(Settings(model="/nowhere"))
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(BundleNotFoundError):
        anyio.run(start)


def test_a_bundle_that_offers_nothing_is_refused(bundle_folder: Path) -> None:
    manifest = read_manifest(bundle_folder)
    presets = [entry.model_copy(update={"offered": False}) for entry in manifest.presets]
    with pytest.raises(InvalidPlanError):
        ServedModel.of(bundle_folder, manifest.model_copy(update={"presets": presets}))


def test_a_damaged_bundle_ends_the_server(bundle_folder: Path, tmp_path: Path) -> None:
    """The device process finds it; the command names the file."""
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle_folder, damaged)
    with (damaged / "student.safetensors").open("r+b") as file:
        file.truncate(1000)
    with running(damaged, ready=False) as live:
        eventually(lambda: live.server.failure is not None, "the start fails")
    assert isinstance(live.server.failure, HashMismatchError)
    assert "student.safetensors" in str(live.server.failure)


def test_models_says_what_a_client_needs(server: Running) -> None:
    [model] = server.client.get("/models").json()["models"]
    assert model["name"] == "tiny"
    assert model["classes"][8] == "ship"
    assert model["image"] == {"width": 32, "height": 32}
    assert model["steps"] == {"min": 1, "max": 64}
    assert model["defaults"] == {"steps": 1, "n": 1, "format": "png"}
    assert model["limits"] == {"n": 16}
    plans = {plan["name"]: plan for plan in model["plans"]}
    assert plans["dd-2"]["steps"] == 2
    assert plans["dd-2"]["metrics"]["fid"] == 40.0
    assert plans["teacher"]["segments"] == [["teacher", 0, 64]]
    assert not plans["onestep"]["offered"]
    for run in model["budgets"]:
        for steps in (run["from"], run["to"]):
            assert server.post({"label": 0, "seed": 0, "steps": steps}).json()["plan"] == run["plan"]
    assert re.fullmatch(r"[0-9a-f]{64}", model["weights"])
    assert "same bytes" in model["determinism"]
    assert model["determinism_mode"] == "exact"


def test_metrics_count_what_happened(bundle_folder: Path) -> None:
    with running(bundle_folder) as live:
        live.post({"label": 0, "n": 3, "format": "webp"})
        live.post({"label": "nothing"})
        live.post({"label": 0, "steps": 0})
        reply = live.client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain")
        families = {family.name: family for family in text_string_to_metric_families(reply.text)}
        names = {"dd_requests", "dd_images", "dd_request_duration_seconds", "dd_queue_wait_seconds"}
        names |= {"dd_batch_execution_seconds", "dd_encode_seconds", "dd_batch_size", "dd_queue_depth"}
        names |= {"dd_inflight_requests", "dd_ready", "dd_build_info", "dd_discarded_compute_seconds"}
        assert names <= set(families)
        count = live.metric
        assert count("dd_requests_total", model="tiny", plan="dd-1", outcome="ok") == 1
        assert count("dd_requests_total", model="tiny", plan="none", outcome="invalid") == 2
        assert count("dd_requests_total", model="none", plan="none", outcome="invalid") == 0
        assert count("dd_images_total", model="tiny", plan="dd-1") == 3
        assert count("dd_encode_seconds_count", format="webp") == 1
        assert count("dd_batch_size_sum") == 3
        assert count("dd_inflight_requests") == 0
        assert count("dd_ready") == 1


@pytest.mark.parametrize(
    "path", ["/", "/docs", *sorted(f"/static/{f.name}" for f in STATIC.glob("*.[cj]s*"))]
)
def test_pages_load_nothing_from_elsewhere(server: Running, path: str) -> None:
    text = server.client.get(path).raise_for_status().text
    assert not re.findall(r"https?://(?!www\.w3\.org)|(?:src|href)=\"//|@import", text)


def test_html_forbids_outside_resources(server: Running) -> None:
    for path in ("/", "/docs"):
        assert "default-src 'self'" in server.client.get(path).headers["content-security-policy"]


def test_the_description_covers_the_contract(server: Running) -> None:
    description = server.client.get("/openapi.json").json()
    assert set(description["paths"]) == {
        "/generate",
        "/images/{receipt}",
        "/v1/images/generations",
        "/v1/models",
        "/v1/models/{name}",
        "/models",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    operation = description["paths"]["/generate"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {
        "label",
        "prompt",
        "model",
        "steps",
        "plan",
        "n",
        "seed",
        "format",
        "priority",
        "deadline_ms",
        "quality",
        "latency_budget_ms",
        "min_quality",
        "brownout",
        "receipt",
        "keep",
        "partial_images",
    }
    assert schema["additionalProperties"] is False
    assert {"200", "400", "404", "406", "413", "415", "429", "500", "503", "504"} <= set(
        operation["responses"]
    )
