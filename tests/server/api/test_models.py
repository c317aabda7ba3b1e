"""Models come and go while the server runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from dd_core.manifest import read_manifest, write_manifest
from server.devices.messages import Command, Forward, Unload
from server.models.catalog import ServedModel, find
from tests.server.helpers import OK, PATIENCE, Gate, Running, busy, eventually, refused, running
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
        assert "killed from outside while it loaded" in refused(reply, 503, "device_killed")
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


def hanging(source: str) -> ServedModel:
    """Finds a model whose source says `hang` never, and any other as ever."""
    if source.startswith("hang"):
        Event().wait()
    return find(source)


def asked(live: Running, pool: Executor, source: str) -> Future[httpx.Response]:
    """A load that is under way."""
    reply = pool.submit(live.client.post, "/admin/models", json={"model": source}, headers=KEY)
    eventually(lambda: source in [load["source"] for load in listed(live)["loads"]], "it is under way")
    return reply


def listed(live: Running) -> dict[str, Any]:
    found: dict[str, Any] = live.client.get("/admin/models", headers=KEY).raise_for_status().json()
    return found


def commands(live: Running, monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """What the device process is told from now on."""
    assert live.state.pool is not None
    [worker] = live.state.pool._workers
    told: list[Command] = []
    send = worker.supervisor.send
    monkeypatch.setattr(worker.supervisor, "send", lambda command: (told.append(command), send(command)))
    return told


def finders() -> list[BaseProcess]:
    """The processes that look for a model."""
    return [process for process in active_children() if process.name == "dd-find"]


def test_a_load_that_never_ends_is_shown_holds_up_nobody_and_can_be_cancelled(
    live: Running, bundle_folder: Path, other: Path
) -> None:
    live.state.loads.find = hanging
    with ThreadPoolExecutor(2) as pool:
        hangs = asked(live, pool, "hang/up")
        post = live.client.post
        again = post("/admin/models", json={"model": "hang/up"}, headers=KEY)
        assert "being loaded already" in refused(again, 409, "conflict", "model")
        assert post("/admin/models", json={"model": str(other)}, headers=KEY).status_code == 201
        assert live.post({**OK, "model": "other"}).status_code == 200
        assert live.client.delete("/admin/models/other", headers=KEY).status_code == 204
        found = listed(live)
        assert found["models"] == [{"name": "tiny", "folder": str(bundle_folder)}] and not found["unloads"]
        [load] = found["loads"]
        assert (load["source"], load["name"]) == ("hang/up", None) and load["seconds"] > 0
        assert len(finders()) == 1 and not hangs.done()
        assert live.client.delete("/admin/models/hang/up", headers=KEY).status_code == 204
        assert "was cancelled" in refused(hangs.result(), 409, "conflict", "model")
    assert listed(live)["loads"] == []
    eventually(lambda: not finders(), "its process is ended")
    refused(live.client.delete("/admin/models/hang/up", headers=KEY), 404, "unknown_model", "name")


def test_a_load_ends_after_its_time(bundle_folder: Path, keys: Path) -> None:
    with running(bundle_folder, warmup=False, admin_keys_file=keys, load_timeout=0.5) as live:
        live.state.loads.find = hanging
        reply = live.client.post("/admin/models", json={"model": "hang"}, headers=KEY)
        assert "within 0.5 s (load_timeout)" in refused(reply, 504, "load_timeout", "model")
        assert listed(live)["loads"] == []
        eventually(lambda: not finders(), "its process is ended")


def test_a_model_whose_load_is_cancelled_on_the_device_is_not_there_but_can_be_loaded_again(
    live: Running, other: Path, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is told to forget it, and what it still loads is not taken for the load that follows."""
    told = commands(live, monkeypatch)
    gate.loads.clear()
    with ThreadPoolExecutor(2) as pool:
        waits = asked(live, pool, str(other))
        eventually(lambda: listed(live)["loads"][0]["name"] == "other", "it is on the device")
        copy = tmp_path / "copy"
        shutil.copytree(other, copy)
        reply = live.client.post("/admin/models", json={"model": str(copy)}, headers=KEY)
        assert "a model other is being loaded already, from" in refused(reply, 409, "conflict", "model")
        assert live.client.delete("/admin/models/other", headers=KEY).status_code == 204
        refused(waits.result(), 409, "conflict", "model")
        assert told[-1] == Unload("other")
        refused(live.post({**OK, "model": "other"}), 404, "unknown_model", "model")
        again = asked(live, pool, str(copy))
        eventually(lambda: listed(live)["loads"][0]["name"] == "other", "it is on the device")
        gate.loads.set()
        assert again.result().status_code == 201
    assert live.post({**OK, "model": "other"}).status_code == 200
    assert live.client.delete("/admin/models/other", headers=KEY).status_code == 204
    assert live.post(OK).status_code == 200


def test_a_load_whose_device_is_killed_says_when_to_come_again(
    live: Running, other: Path, gate: Gate
) -> None:
    """It is no error of the model, nor of the server. Nor is a load refused while another process starts."""
    gate.loads.clear()
    with ThreadPoolExecutor(1) as pool:
        waits = asked(live, pool, str(other))
        eventually(lambda: listed(live)["loads"][0]["name"] == "other", "it is on the device")
        os.kill(live.pid, signal.SIGKILL)
        assert "killed from outside while it loaded" in refused(waits.result(), 503, "device_killed")
        assert waits.result().headers["retry-after"] == "10"
        assert listed(live)["loads"] == []
        gate.loads.set()
        eventually(lambda: live.client.get("/readyz").status_code == 200, "another process is up")
        assert asked(live, pool, str(other)).result().status_code == 201
    assert live.post({**OK, "model": "other"}).status_code == 200


@pytest.mark.parametrize("kills", [1, 2])
def test_a_device_that_is_killed_during_a_warm_up(
    bundle_folder: Path, other: Path, keys: Path, gate: Gate, kills: int
) -> None:
    """The pass is tried once more; then the load is told to come again, and leaves nothing."""
    with (
        running(bundle_folder, gate, admin_keys_file=keys, max_batch=1) as live,
        ThreadPoolExecutor(1) as pool,
    ):
        gate.open.clear()
        gate.calls[:] = []
        waits = asked(live, pool, str(other))
        for kill in range(1, kills + 1):
            eventually(lambda expected=kill: len(gate.calls) == expected, "its first pass is on the device")
            os.kill(live.pid, signal.SIGKILL)
            eventually(lambda expected=kill: live.metric("dd_worker_restarts_total") == expected, "noticed")
        gate.open.set()
        if kills == 1:
            assert waits.result().status_code == 201
            assert live.post({**OK, "model": "other"}).status_code == 200
        else:
            assert "during the warm-up" in refused(waits.result(), 503, "device_killed")
            refused(live.post({**OK, "model": "other"}), 404, "unknown_model", "model")


def test_models_are_warmed_up_side_by_side(
    bundle_folder: Path, other: Path, keys: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image of the one has the number of an image of the other."""
    third = tiny_bundle(other.parent / "third", seed=2)
    write_manifest(third, read_manifest(third).model_copy(update={"name": "third"}))
    with (
        running(bundle_folder, gate, admin_keys_file=keys, max_batch=2) as live,
        ThreadPoolExecutor(2) as pool,
    ):
        told = commands(live, monkeypatch)
        gate.open.clear()
        gate.calls[:] = []
        loads = [asked(live, pool, str(folder)) for folder in (other, third)]
        eventually(lambda: {load["name"] for load in listed(live)["loads"]} == {"other", "third"}, "both")
        eventually(lambda: len(gate.calls) > 0, "one is on the device")
        gate.open.set()
        assert [load.result().status_code for load in loads] == [201, 201]
        numbers: dict[str, set[int]] = {"other": set(), "third": set()}
        for command in told:
            if isinstance(command, Forward):
                numbers[command.model] |= set(command.numbers)
        assert numbers["other"] and numbers["third"] and not numbers["other"] & numbers["third"]
        for name in ("tiny", "other", "third"):
            assert live.post({**OK, "model": name}).status_code == 200


def test_a_server_ends_in_time_though_a_load_hangs(bundle_folder: Path, keys: Path) -> None:
    """The hub takes the connection and never answers; whoever waits is told why it ended."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        command = [sys.executable, "-m", "server", "serve", str(bundle_folder), "--port", "0"]
        command += ["--device", "cpu", "--no-warmup", "--admin-keys-file", str(keys)]
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "600",
            "HF_HOME": str(keys.parent / "hf"),
            "DD_HOME": str(keys.parent / "home"),
        }
        with (
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process,
            ThreadPoolExecutor(1) as pool,
        ):
            try:
                assert process.stderr is not None
                lines = iter(process.stderr.readline, "")
                url = next(m[1] for line in lines if (m := re.search(r"listening on (http://\S+)", line)))
                assert any(line.rstrip().endswith("ready") for line in lines)
                body = {"model": "var-dd-d16"}
                reply = pool.submit(
                    httpx.post, f"{url}/admin/models", json=body, headers=KEY, timeout=PATIENCE
                )
                with hub.accept()[0]:  # the hub is asked
                    process.send_signal(signal.SIGTERM)
                    refused(reply.result(), 503, "draining")
                    assert process.wait(PATIENCE) == 0
            finally:
                process.kill()
