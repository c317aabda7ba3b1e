"""The promise of `determinism: exact`: the same bytes alone, and in any mix, batch and bucket."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.server.harness import Running, running

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
    }


def images(live: Running, body: dict[str, Any]) -> list[str]:
    return [image["data"] for image in live.post(body).raise_for_status().json()["images"]]


def test_random_mixes_give_the_bytes_of_single_runs(bundle_folder: Path) -> None:
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
    with running(bundle_folder, max_batch=1, policy="fifo", warmup=False) as live:
        for body in bodies[:10]:
            assert images(live, body) == seen[body["seed"]], "another scheduler, other bytes"


def test_two_device_processes_give_the_same_bytes(bundle_folder: Path) -> None:
    body = {"label": 1, "seed": 5, "n": 4, "steps": 2}
    with running(bundle_folder, device="cpu,cpu", warmup=False) as live, ThreadPoolExecutor(8) as pool:
        assert live.state.engine is not None
        assert len(set(live.state.engine.pids)) == 2
        replies = list(pool.map(lambda _: images(live, body), range(16)))
    assert all(found == replies[0] for found in replies)
