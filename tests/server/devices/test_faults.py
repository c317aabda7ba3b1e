"""A device that fails: only the guilty request does, and nothing that was accepted is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.helpers import OK, Gate, Running, busy, eventually, refused, running

LABELS = (1, 2, 3, 4, 5)
LATE = {**OK, "deadline_ms": 1, "brownout": False}


def posted(
    live: Running, gate: Gate, pool: ThreadPoolExecutor, **body: object
) -> list[Future[httpx.Response]]:
    """A request on the device and one of each of `LABELS` behind it; then the device goes on."""
    replies = [busy(live, gate, pool)]
    replies += [pool.submit(live.post, {"label": label, "seed": 1, **body}) for label in LABELS]
    eventually(lambda: live.depth == len(LABELS), "they wait")
    gate.open.set()
    return replies


@pytest.fixture
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1 + len(LABELS))


def outcomes(live: Running, outcome: str, plan: str = "dd-1") -> float:
    return live.metric("dd_requests_total", model="tiny", plan=plan, outcome=outcome)


@pytest.mark.parametrize(
    ("fault", "code", "outcome"),
    [
        ("poisoned", "compute_failed", "error"),
        ("exhausting", "out_of_memory", "oom"),
        ("broken", "compute_failed", "error"),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_only_the_guilty_request_fails(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor, fault: str, code: str, outcome: str, steps: int
) -> None:
    """An exception, no memory, a NaN: in a batch with others, in the first pass or a later one."""
    with running(bundle_folder, gate, warmup=False, max_batch=8) as live:
        alone = {label: live.post({"label": label, "seed": 1, "steps": steps}).content for label in (1, 2)}
        getattr(gate, fault).value = 3
        first, *others = posted(live, gate, pool, steps=steps)
        assert first.result().status_code == 200
        replies = {label: reply.result() for label, reply in zip(LABELS, others, strict=True)}
        assert "secret" not in refused(replies.pop(3), 500, code)
        assert all(reply.status_code == 200 for reply in replies.values())
        plan = {1: "dd-1", 2: "dd-2", 12: "pre-trained-11-21"}[steps]
        assert outcomes(live, outcome, plan) == 1
        for label, before in alone.items():
            images = [
                httpx.Response(200, content=c).json()["images"] for c in (before, replies[label].content)
            ]
            assert images[0] == images[1], "another picture after the fault"
        # Where decoding costs most of a one-step request, batches of one are as good.
        assert steps == 1 or any(len(c) > 1 and 3 in c for c in gate.calls[:]), "it never shared a batch"
        assert live.post(OK).status_code == 200


def test_a_batch_that_does_not_fit_is_made_in_smaller_ones(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    gate.most_rows.value = 2
    with running(bundle_folder, gate, warmup=False, max_batch=8) as live:
        assert [reply.result().status_code for reply in posted(live, gate, pool)] == [200] * 6
        gate.calls[:] = []
        assert live.post({"label": 1, "n": 8}).status_code == 200
        assert max(len(call) for call in gate.calls[:]) <= 2, "it tried a size that does not fit again"


def test_a_killed_device_process_is_replaced_and_nothing_is_lost(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    """kill -9 with requests on the device, between its passes and in the queue."""
    with running(bundle_folder, gate, warmup=False) as live:
        bodies = [{"label": label, "seed": 1, "steps": steps} for label in (1, 2) for steps in (1, 2, 64)]
        alone = [live.post(body).json()["images"] for body in bodies]
        first = busy(live, gate, pool)
        with ThreadPoolExecutor(len(bodies)) as more:
            replies = [more.submit(live.post, body) for body in bodies]
            eventually(lambda: live.depth == len(bodies), "they wait")
            old = live.pid
            os.kill(old, signal.SIGKILL)
            eventually(lambda: live.metric("dd_worker_restarts_total") == 1, "noticed")
            assert live.metric("dd_ready") == 0
            gate.open.set()
            assert first.result().status_code == 200
            assert [reply.result().json()["images"] for reply in replies] == alone
        eventually(lambda: live.metric("dd_worker_recovery_seconds_count") == 1, "recovered")
        assert live.pid != old
        assert live.metric("dd_ready") == 1
        assert live.client.get("/readyz").status_code == 200


def test_a_request_that_kills_the_device_is_found_and_the_others_are_answered(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    with running(bundle_folder, gate, warmup=False) as live:
        gate.deadly.value = 4
        first, *others = posted(live, gate, pool)
        assert first.result().status_code == 200
        replies = {label: reply.result() for label, reply in zip(LABELS, others, strict=True)}
        assert "twice" in refused(replies.pop(4), 500, "compute_failed")
        assert [reply.status_code for reply in replies.values()] == [200] * 4
        assert live.metric("dd_worker_restarts_total") == 2


@pytest.mark.parametrize("kills", [2, 3])
def test_a_request_is_not_blamed_for_a_device_that_was_killed_from_outside(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor, kills: int
) -> None:
    """It is made after two kills, and told to come again after the third."""
    with running(bundle_folder, gate, warmup=False) as live:
        reply = busy(live, gate, pool)
        for kill in range(1, kills + 1):
            eventually(lambda expected=kill: len(gate.calls) == expected, "it is on the device")
            os.kill(live.pid, signal.SIGKILL)
            eventually(
                lambda expected=kill: live.metric("dd_worker_restarts_total") == expected, "it was noticed"
            )
        gate.open.set()
        if kills == 2:
            assert reply.result().status_code == 200
        else:
            assert "killed from outside 3 times" in refused(reply.result(), 503, "device_killed")
            assert reply.result().headers["retry-after"] == "10"
        assert live.post(OK).status_code == 200


def test_a_request_is_not_blamed_for_a_device_that_was_stopped_from_outside(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    """The watchdog kills it, as it would a device that hangs by its own doing: that counts."""
    with running(bundle_folder, gate, warmup=False, hang_timeout=3.0) as live:
        reply = busy(live, gate, pool)
        for stop in (1, 2):
            eventually(lambda expected=stop: len(gate.calls) == expected, "it is on the device")
            os.kill(live.pid, signal.SIGSTOP)
            eventually(
                lambda expected=stop: live.metric("dd_worker_restarts_total") == expected, "the watchdog acts"
            )
        gate.open.set()
        assert reply.result().status_code == 200


def test_a_device_process_that_dies_while_it_is_replaced_is_replaced_again(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    with running(bundle_folder, gate, warmup=False) as live:
        reply = busy(live, gate, pool)
        gate.fatal_loads.value = 3
        os.kill(live.pid, signal.SIGKILL)
        gate.open.set()
        assert reply.result().status_code == 200
        assert live.server.failure is None and gate.fatal_loads.value == 0
        assert live.metric("dd_worker_restarts_total") == 4


def test_a_device_process_that_is_stopped_while_it_is_replaced_is_replaced_again(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    with running(bundle_folder, gate, warmup=False, hang_timeout=2) as live:
        reply = busy(live, gate, pool)
        killed = live.pid
        gate.loads.clear()
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: _pid_of(live) not in (None, killed), "another one loads")
        second = live.pid
        os.kill(second, signal.SIGSTOP)
        gate.loads.set()
        gate.open.set()
        assert live.client.get("/healthz").status_code == 200
        assert reply.result().status_code == 200
        assert live.pid not in (killed, second) and live.metric("dd_worker_restarts_total") == 2


def _pid_of(live: Running) -> int | None:
    assert live.state.pool is not None
    return live.state.pool.pids[0]


def test_a_device_process_that_only_dies_ends_the_server(bundle_folder: Path, gate: Gate) -> None:
    """A crash loop is the operator's to see: the process ends, with an error."""
    with running(bundle_folder, gate, warmup=False) as live:
        for _ in range(6):
            if live.server.failure is None:
                eventually(lambda: live.state.pool is not None and live.state.pool.up, "it is back")
                os.kill(live.pid, signal.SIGKILL)
                eventually(lambda: not live.state.pool.up, "it died")  # type: ignore[union-attr]
        eventually(lambda: live.server.failure is not None, "given up")
        assert "died 6 times in a row" in str(live.server.failure)


def test_a_server_is_ready_while_one_of_its_devices_lives(bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, warmup=False, device="cpu,cpu") as live:
        assert live.state.pool is not None
        first, second = live.state.pool.pids
        assert first is not None and second is not None
        gate.loads.clear()
        os.kill(first, signal.SIGKILL)
        eventually(lambda: live.metric("dd_worker_restarts_total") == 1, "one has died")
        assert live.client.get("/readyz").status_code == 200
        assert live.metric("dd_ready") == 1
        assert live.post(OK).status_code == 200
        os.kill(second, signal.SIGKILL)
        eventually(lambda: live.metric("dd_worker_restarts_total") == 2, "both have died")
        assert "every device" in refused(live.client.get("/readyz"), 503, "not_ready")
        assert live.metric("dd_ready") == 0
        gate.loads.set()
        eventually(lambda: live.client.get("/readyz").status_code == 200, "one is back")
        assert live.metric("dd_ready") == 1


def test_a_pass_that_hangs_is_ended(bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor) -> None:
    with running(bundle_folder, gate, warmup=False, hang_timeout=1.0) as live:
        reply = busy(live, gate, pool)
        eventually(lambda: live.metric("dd_worker_restarts_total") == 1, "the watchdog acts")
        gate.open.set()
        assert reply.result().status_code == 200


def test_an_unreachable_deadline_is_refused_at_once_and_a_passed_one_dropped(
    bundle_folder: Path, gate: Gate, pool: ThreadPoolExecutor
) -> None:
    with running(bundle_folder, gate, max_batch=1) as live:
        first = busy(live, gate, pool)
        message = refused(live.post({**LATE, "steps": 64}), 503, "deadline_unreachable")
        assert "would start in" in message
        waits = pool.submit(live.post, {"label": 6, "deadline_ms": 2000})
        eventually(lambda: live.depth == 1, "it was accepted")
        refused(waits.result(), 504, "deadline_exceeded")
        assert live.depth == 0
        gate.open.set()
        assert first.result().status_code == 200
        assert live.post({**OK, "deadline_ms": 60_000, "priority": "high"}).status_code == 200
        assert not any(6 in call for call in gate.calls[:]), "it was computed all the same"
        assert outcomes(live, "deadline") == 1
        assert outcomes(live, "deadline", "teacher") == 1


def test_the_device_process_ends_with_the_server(bundle_folder: Path) -> None:
    with running(bundle_folder, warmup=False) as live:
        pid = live.pid
        os.kill(pid, 0)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")


def test_a_server_whose_device_is_stopped_ends_in_its_drain_time(bundle_folder: Path) -> None:
    """Whoever waits is told; the process that cannot end by itself is ended."""
    with running(bundle_folder, drain_timeout=1.0) as live, ThreadPoolExecutor(1) as pool:
        pid = live.pid
        os.kill(pid, signal.SIGSTOP)
        asked = pool.submit(live.post, {"label": 1, "seed": 2, "n": 16})
        eventually(lambda: live.metric("dd_inflight_requests") == 1, "it waits")
        live.server.handle_exit(signal.SIGTERM, None)
        refused(asked.result(), 503, "draining")
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "the device is gone")


def test_a_device_that_stops_at_any_moment_does_not_stop_the_server(bundle_folder: Path) -> None:
    """Stopped in the middle of reading, computing or writing an answer, hundreds of times."""
    draw = random.Random(5)
    with running(bundle_folder) as live, ThreadPoolExecutor(2) as pool:
        for turn in range(200):
            asked = pool.submit(live.post, {"label": turn % 10, "seed": turn, "n": 3, "format": "webp"})
            time.sleep(draw.uniform(0.0, 0.02))
            os.kill(live.pid, signal.SIGSTOP)
            try:
                assert httpx.get(f"{live.url}/healthz", timeout=1.0).status_code == 200
            finally:
                os.kill(live.pid, signal.SIGCONT)
            assert asked.result().status_code == 200
        assert live.metric("dd_worker_restarts_total") == 0


def test_a_device_that_stops_for_good_is_replaced_and_its_work_done_again(bundle_folder: Path) -> None:
    with running(bundle_folder, hang_timeout=2.0) as live, ThreadPoolExecutor(1) as pool:
        expected = live.post({"label": 1, "seed": 2, "n": 16}).json()["images"]
        os.kill(live.pid, signal.SIGSTOP)
        asked = pool.submit(live.post, {"label": 1, "seed": 2, "n": 16})
        assert httpx.get(f"{live.url}/healthz", timeout=1.0).status_code == 200
        assert asked.result().json()["images"] == expected
        assert live.metric("dd_worker_restarts_total") == 1
