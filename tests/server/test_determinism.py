"""The promise of `determinism: exact`: the same bytes alone, and in any mix, batch and bucket."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fifo_server import FifoScheduler
from server.devices import pool as device_pool
from server.devices.in_flight import InFlight
from server.devices.messages import Forward
from server.devices.supervisor import Supervisor
from server.devices.worker import DeviceWorker
from tests.server.generation.test_runner import stream
from tests.server.helpers import Gate, Running, eventually, refused, running

STEPS = (1, 1, 1, 2, 2, 12, 21, 64)


def request(draw: random.Random) -> dict[str, Any]:
    """One of a few dozen requests, so that each comes several times."""
    number = draw.randrange(40)
    fixed = random.Random(number)
    return {
        "label": fixed.randrange(10),
        "seed": number,
        "steps": fixed.choice(STEPS),
        "n": fixed.randint(1, 4),
        "priority": draw.choice(["low", "normal", "high"]),
        "brownout": False,  # or a busy machine answers with a cheaper plan
    }


def images(live: Running, body: dict[str, Any]) -> list[str]:
    return [image["data"] for image in live.post(body).raise_for_status().json()["images"]]


def test_random_mixes_give_the_bytes_of_single_runs(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(3)
    bodies = [request(draw) for _ in range(160)]
    seen: dict[int, list[str]] = {}
    with running(bundle_folder, max_batch=8, queue_size=2000) as live, ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda body: images(live, body), bodies))
        assert live.metric("dd_batch_size_bucket", le="1.0") < live.metric("dd_batch_size_count")
        for body, found in zip(bodies, together, strict=True):
            if body["seed"] not in seen:
                seen[body["seed"]] = images(live, body)
            assert found == seen[body["seed"]], body
    monkeypatch.setattr(device_pool, "Scheduler", FifoScheduler)
    with running(bundle_folder, max_batch=1, warmup=False) as live:
        for body in bodies[:10]:
            assert images(live, body) == seen[body["seed"]], "another scheduler, other bytes"


def test_passes_that_are_sent_ahead_give_the_same_bytes(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU has them: it begins one while the pictures of another are still to be taken."""
    draw = random.Random(4)
    bodies = [request(draw) for _ in range(40)]
    with running(bundle_folder, warmup=False) as live:
        alone = [images(live, body) for body in bodies]
    monkeypatch.setattr(InFlight, "until_next", property(lambda self: None if len(self) > 1 else 0.0))
    monkeypatch.setattr(DeviceWorker, "_on_gpu", True)
    forward, both = Supervisor.forward, set()

    def counted(self: Supervisor, command: Forward, watched: bool = True) -> None:
        forward(self, command, watched)
        both.add(len(self._passes))

    monkeypatch.setattr(Supervisor, "forward", counted)
    with running(bundle_folder, warmup=False, max_batch=8) as live, ThreadPoolExecutor(24) as pool:
        assert list(pool.map(lambda body: images(live, body), bodies)) == alone
    assert both == {1, 2}


def test_two_device_processes_give_the_same_bytes(bundle_folder: Path) -> None:
    body = {"label": 1, "seed": 5, "n": 4, "steps": 2, "brownout": False}
    with running(bundle_folder, device="cpu,cpu", warmup=False) as live, ThreadPoolExecutor(8) as pool:
        assert live.state.pool is not None
        assert len(set(live.state.pool.pids)) == 2
        replies = list(pool.map(lambda _: images(live, body), range(16)))
    assert all(found == replies[0] for found in replies)


def test_images_dealt_out_to_two_processes_have_the_same_bytes(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone in a reply, and in a stream whose previews come from both."""
    body = {"label": 1, "seed": 5, "n": 3, "steps": 2, "brownout": False}
    with running(bundle_folder, warmup=False) as live:
        alone, shown = images(live, body), pictures(live, body)
    monkeypatch.setattr(device_pool, "dispatch", device_pool.split_evenly)
    with running(bundle_folder, device="cpu,cpu", warmup=False) as live:
        assert images(live, body) == alone
        assert pictures(live, body) == shown
    assert len(shown) == 6


def pictures(live: Running, body: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Those of a stream by image and stage."""
    found = [data for name, data in stream(live, **body) if name == "image"]
    return {(data["image"]["index"], data["stage"]): data["image"]["data"] for data in found}


def test_what_fails_in_one_process_fails_the_request_alone(
    bundle_folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_pool, "dispatch", device_pool.split_evenly)
    with running(bundle_folder, gate, device="cpu,cpu", warmup=False) as live:
        gate.poisoned.value = 5
        refused(live.post({"label": 5, "n": 4}), 500, "compute_failed")
        assert live.post({"label": 1, "n": 4}).status_code == 200
        eventually(lambda: live.depth == 0, "nothing is left over")
