"""Models come and go while the server runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dd_core.manifest import read_manifest, write_manifest
from tests.server.helpers import OK, Gate, Running, busy, eventually, refused, running
from tests.tiny import tiny_bundle

KEY = {"authorization": "Bearer admin-key-of-a-test"}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A second model, of other weights and another name."""
    folder = tiny_bundle(tmp_path / "other", seed=1)
    write_manifest(folder, read_manifest(folder).model_copy(update={"name": "other"}))
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("ops:admin-key-of-a-test\n")
    return file


@pytest.fixture
def live(bundle_folder: Path, gate: Gate, keys: Path) -> Iterator[Running]:
    with running(bundle_folder, gate, warmup=False, admin_keys_file=keys) as live:
        yield live


def test_a_model_is_loaded_served_and_unloaded(live: Running, other: Path) -> None:
    before = live.post(OK).json()["images"]
    reply = live.client.post("/admin/models", json={"model": str(other)}, headers=KEY)
    assert reply.status_code == 201 and reply.json()["name"] == "other"
    registry = live.state.metrics.registry
    assert registry.get_sample_value("dd_images_total", {"model": "other", "plan": "dd-1"}) == 0.0
    assert {m["name"] for m in live.client.get("/models").json()["models"]} == {"tiny", "other"}
    assert "several models" in refused(live.post(OK), 400, "invalid_request", "model")
    images = live.post({**OK, "model": "other"}).json()["images"]
    assert images != before
    assert live.post({**OK, "model": "tiny"}).json()["images"] == before
    assert live.client.delete("/admin/models/other", headers=KEY).status_code == 204
    refused(live.post({**OK, "model": "other"}), 404, "unknown_model", "model")
    assert live.post(OK).json()["images"] == before


def test_a_loaded_model_survives_the_death_of_the_device_process(live: Running, other: Path) -> None:
    live.client.post("/admin/models", json={"model": str(other)}, headers=KEY).raise_for_status()
    before = live.post({**OK, "model": "other"}).json()["images"]
    os.kill(live.pid, signal.SIGKILL)
    assert live.post({**OK, "model": "other"}).json()["images"] == before


def test_a_model_that_one_process_cannot_load_is_loaded_in_none(
    bundle_folder: Path, other: Path, gate: Gate, keys: Path
) -> None:
    with running(bundle_folder, gate, warmup=False, admin_keys_file=keys, device="cpu,cpu") as live:
        gate.fatal_loads.value = 1
        reply = live.client.post("/admin/models", json={"model": str(other)}, headers=KEY)
        assert "died while it loaded" in refused(reply, 500, "compute_failed")
        refused(live.post({**OK, "model": "other"}), 404, "unknown_model", "model")
        eventually(lambda: live.metric("dd_worker_recovery_seconds_count") == 1, "the process is back")
        live.client.post("/admin/models", json={"model": str(other)}, headers=KEY).raise_for_status()
        assert live.post({**OK, "model": "other"}).status_code == 200


def test_unloading_waits_for_the_models_requests(live: Running, gate: Gate) -> None:
    with ThreadPoolExecutor(3) as pool:
        first = busy(live, gate, pool)
        waits = pool.submit(live.post, {"label": 1})
        eventually(lambda: live.depth == 1, "it waits")
        gone = pool.submit(live.client.delete, "/admin/models/tiny", headers=KEY)
        eventually(lambda: not live.state.catalog.models, "no more requests for it")
        gate.open.set()
        assert first.result().status_code == waits.result().status_code == 200
        assert gone.result().status_code == 204


def test_bad_requests_change_nothing(live: Running, bundle_folder: Path, tmp_path: Path) -> None:
    post = live.client.post
    spaced = post("/admin/models", json={"model": f" {bundle_folder} "}, headers=KEY)
    assert refused(spaced, 409, "conflict", "model").count(str(bundle_folder)) == 2, "both sources"
    for source in (" ", "x" * 5000, "\0"):
        refused(post("/admin/models", json={"model": source}, headers=KEY), 400, "invalid_request", "model")
    reply = post("/admin/models", json={"model": "nowhere"}, headers=KEY)
    assert "no bundle" in refused(reply, 400, "invalid_request", "model")
    refused(post("/admin/models", json={}, headers=KEY), 400, "invalid_request", "model")
    refused(live.client.delete("/admin/models/none", headers=KEY), 404, "unknown_model", "name")
    broken = tiny_bundle(tmp_path / "broken")
    write_manifest(broken, read_manifest(broken).model_copy(update={"name": "broken"}))
    with (broken / "teacher.safetensors").open("r+b") as file:
        file.truncate(500)
    reply = post("/admin/models", json={"model": str(broken)}, headers=KEY)
    assert "teacher.safetensors" in refused(reply, 400, "invalid_request", "model")
    assert live.post(OK).status_code == 200
    assert [m["name"] for m in live.client.get("/models").json()["models"]] == ["tiny"]


def test_without_the_key_there_is_nothing_to_do(live: Running) -> None:
    refused(live.client.post("/admin/models", json={"model": "x"}), 401, "unauthorized")
    assert live.post(OK).status_code == 200
