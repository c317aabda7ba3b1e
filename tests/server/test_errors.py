"""Bad input, a full queue, a device that fails, clients that leave: one clean error each."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.generation.test_runner import parse
from tests.server.helpers import OK, Gate, Running, Turnstile, busy, eventually, refused, running
from tests.server.middleware.sockets import HEAD, connected, refusal, rest


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "label", "airplane"),
        ({"label": "shp"}, "label", "ship"),
        ({"label": 10}, "label", "0 to 9"),
        ({"label": -1}, "label", "0 to 9"),
        ({"label": True}, "label", "class index"),
        ({"label": 1.0}, "label", "class index"),
        ({"label": ["ship"]}, "label", "class index"),
        ({"label": "x" * 5000}, "label", "unknown class"),
        ({"label": "ship", "prompt": "a ship"}, "prompt", "not both"),
        ({"prompt": "a ship"}, "prompt", "send label"),
        ({**OK, "steps": 0}, "steps", "from 1 to 64"),
        ({**OK, "steps": 10**9}, "steps", "from 1 to 64"),
        ({**OK, "steps": 65}, "steps", "from 1 to 64"),
        ({**OK, "steps": -1}, "steps", "from 1 to 64"),
        ({**OK, "steps": "2"}, "steps", "integer"),
        ({**OK, "steps": 1.0}, "steps", "integer"),
        ({**OK, "steps": True}, "steps", "integer"),
        ({**OK, "n": 0}, "n", "1"),
        ({**OK, "n": 17}, "n", "1 to 16"),
        ({**OK, "n": 10**9}, "n", "1 to 16"),
        ({**OK, "seed": -1}, "seed", "0"),
        ({**OK, "seed": 2**53}, "seed", "9007199254740991"),
        ({**OK, "seed": str(2**63)}, "seed", "9223372036854775807"),
        ({**OK, "seed": ""}, "seed", "integer"),
        ({**OK, "seed": " 7"}, "seed", "integer"),
        ({**OK, "seed": "-1"}, "seed", "integer"),
        ({**OK, "seed": "\u0667"}, "seed", "integer"),
        ({**OK, "seed": "1e3"}, "seed", "integer"),
        ({**OK, "seed": "1" * 9999}, "seed", "integer"),
        ({**OK, "seed": 7.0}, "seed", "integer"),
        ({**OK, "seed": True}, "seed", "integer"),
        ({**OK, "format": "gif"}, "format", "webp"),
        ({**OK, "labels": 3}, "labels", "unknown field"),
        ({**OK, "k" * 5000: 3}, "k" * 64 + "…", "unknown field"),
        ([], None, "object"),
        ("ship", None, "object"),
    ],
)
def test_a_request_against_the_contract(server: Running, body: Any, param: str | None, says: str) -> None:
    assert says in refused(server.post(body), 400, "invalid_request", param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"label=ship", b'{"label": ship}', b"\xff\xfe", b"[" * 60000, b'{"label": "\\ud800"}']
)
def test_malformed_json(server: Running, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    refused(server.client.post("/generate", content=body, headers=headers), 400, "invalid_json")


def test_an_unknown_model_is_named(server: Running) -> None:
    assert "tiny" in refused(server.post({**OK, "model": "imagenet"}), 404, "unknown_model", "model")
    assert server.post({**OK, "model": "tiny"}).status_code == 200


def test_another_media_type(server: Running) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    reply = server.client.post("/generate", content=b'{"label": 1}', headers=form)
    refused(reply, 415, "unsupported_media_type")


def test_what_accept_excludes(server: Running) -> None:
    refused(server.post({**OK, "n": 2}, accept="image/png"), 406, "not_acceptable", "n")
    refused(server.post({**OK, "format": "png"}, accept="image/jpeg"), 406, "not_acceptable", "format")
    refused(server.post(OK, accept="text/html"), 406, "not_acceptable", "accept")


def test_paths_and_methods_that_do_not_exist(server: Running) -> None:
    refused(server.client.get("/nothing"), 404, "not_found")
    refused(server.client.get("/static/nothing.js"), 404, "not_found")
    refused(server.client.get("/generate"), 405, "method_not_allowed")
    refused(server.client.delete("/models"), 405, "method_not_allowed")


def _chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 2**16):
        yield b"x" * 2**16


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_50_mb_is_refused_and_the_server_goes_on(server: Running, chunked: bool) -> None:
    """The reply must arrive although the client sends everything before it reads."""
    size = 50 * 10**6
    content = _chunks(size) if chunked else b"x" * size
    headers = {"content-type": "application/json"}
    message = refused(
        server.client.post("/generate", content=content, headers=headers), 413, "body_too_large"
    )
    assert "65536" in message
    assert server.post(OK).status_code == 200


def test_a_declared_length_is_refused_before_the_body_comes(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(head)
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_full_queue_answers_429_with_the_time_to_come_again(bundle_folder: Path, gate: Gate) -> None:
    with (
        running(bundle_folder, gate, queue_size=4, max_images=4, max_batch=2) as live,
        ThreadPoolExecutor(4) as pool,
    ):
        waiting = [busy(live, gate, pool)]
        waiting += [pool.submit(live.post, {"label": 1, "seed": 0, "n": 2}) for _ in range(2)]
        eventually(lambda: live.depth == 4, "the queue is full")
        reply = live.post({"label": 2, "seed": 0})
        message = refused(reply, 429, "queue_full")
        seconds = int(reply.headers["retry-after"])
        assert 1 <= seconds <= 60
        assert f"{seconds} s" in message
        gate.open.set()
        assert [r.result().status_code for r in waiting] == [200, 200, 200]
        assert live.post({"label": 2, "seed": 0}).status_code == 200
        assert live.metric("dd_requests_total", model="tiny", plan="dd-1", outcome="rejected") == 1


def test_a_device_that_fails_costs_only_the_requests_that_fail_by_themselves(
    bundle_folder: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with running(bundle_folder, gate, warmup=False) as live, ThreadPoolExecutor(4) as pool:
        expected = live.post({"label": 1, "seed": 3}).json()["images"]
        gate.poisoned.value = 5
        first = busy(live, gate, pool)
        bad = pool.submit(live.post, {"label": 5, "seed": 0})
        good = pool.submit(live.post, {"label": 1, "seed": 3})
        eventually(lambda: live.depth == 2, "both wait")
        gate.open.set()
        assert first.result().status_code == 200
        assert "secret" not in refused(bad.result(), 500, "compute_failed")
        assert good.result().json()["images"] == expected
        assert [5, 1] in gate.calls[:] or [1, 5] in gate.calls[:], "they never shared a batch"
        assert live.metric("dd_requests_total", model="tiny", plan="dd-1", outcome="error") == 1
        assert live.post(OK).status_code == 200
    assert "RuntimeError" in caplog.text, "the device's own log has the rest"


def test_a_bug_gives_a_clean_500(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    with running(bundle_folder, warmup=False) as live:
        monkeypatch.setattr(live.state.encoder, "encode_all", broken)
        reply = live.post(OK, **{"x-request-id": "find-me"})
        assert "secret" not in refused(reply, 500, "internal_error")
        assert live.metric("dd_requests_total", model="tiny", plan="dd-1", outcome="error") == 1
        monkeypatch.undo()
        assert live.post(OK).status_code == 200
    assert "find-me" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_client_that_leaves_is_not_computed_for(bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, max_batch=1, warmup=False) as live, ThreadPoolExecutor(2) as pool:
        first = busy(live, gate, pool)
        with pytest.raises(httpx.ReadTimeout):
            live.client.post("/generate", json={"label": 6, "n": 3}, timeout=0.3)
        eventually(lambda: live.depth == 0, "the server notices")
        stays = pool.submit(live.post, {"label": 1, "seed": 0})
        eventually(lambda: live.depth == 1, "another waits")
        gate.open.set()
        assert first.result().status_code == stays.result().status_code == 200
        assert not any(6 in call for call in gate.calls[:])
        assert live.metric("dd_requests_total", model="tiny", plan="dd-1", outcome="canceled") == 1
        assert live.metric("dd_discarded_compute_seconds_total") == 0


def test_compute_for_a_client_that_left_is_counted(bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, warmup=False) as live:
        gate.open.clear()
        with pytest.raises(httpx.ReadTimeout):
            live.client.post("/generate", json={"label": 6}, timeout=0.3)
        eventually(
            lambda: live.metric("dd_requests_total", model="tiny", plan="dd-1", outcome="canceled") == 1,
            "noticed",
        )
        gate.open.set()
        eventually(lambda: live.metric("dd_discarded_compute_seconds_total") > 0, "counted")
        assert live.metric("dd_images_total", model="tiny", plan="dd-1") == 0


def test_a_drain_lets_running_requests_end_and_refuses_new_ones(bundle_folder: Path, gate: Gate) -> None:
    with (
        running(bundle_folder, gate, warmup=False) as live,
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=live.url) as kept,
    ):
        assert kept.get("/readyz").status_code == 200
        gate.open.clear()
        runs = pool.submit(live.post, OK)
        eventually(lambda: gate.calls[:] == [[8]], "a request is on the device")
        live.state.drain()
        refused(kept.get("/readyz"), 503, "draining")
        reply = kept.post("/generate", json=OK)
        refused(reply, 503, "draining")
        assert int(reply.headers["retry-after"]) >= 1
        live.server.should_exit = True
        threading.Timer(0.5, gate.open.set).start()
        assert runs.result().status_code == 200


def test_a_drain_is_bounded(bundle_folder: Path, gate: Gate) -> None:
    with ThreadPoolExecutor(2) as pool:
        started = time.monotonic()
        with running(bundle_folder, gate, drain_timeout=0.5, max_batch=1, warmup=False) as live:
            gate.open.clear()
            runs = [pool.submit(live.post, OK) for _ in range(2)]
            eventually(
                lambda: live.metric("dd_inflight_requests") == 2 and live.depth == 1, "one runs, one waits"
            )
            live.server.should_exit = True
            for request in runs:
                refused(request.result(), 503, "draining")
            gate.open.set()
        assert time.monotonic() - started < 60


def test_a_request_whose_body_is_not_there_at_the_end_of_a_drain_is_told_so(bundle_folder: Path) -> None:
    with running(bundle_folder, drain_timeout=0.3, warmup=False) as live, connected(live) as raw:
        raw.sendall(HEAD)
        eventually(lambda: live.metric("dd_inflight_requests") == 1, "it is there")
        live.server.should_exit = True
        assert refusal(rest(raw)) == (503, "draining")
        assert live.metric("dd_rejects_total", reason="draining") == 1


def test_a_stream_that_runs_at_the_end_of_a_drain_says_so(bundle_folder: Path, manager: SyncManager) -> None:
    """Its first picture is there, the second one is on a device that stays busy."""
    passes = Turnstile()
    passes.set()  # for the warm-up
    with running(
        bundle_folder, Gate(open=passes, calls=manager.list()), drain_timeout=0.5, warmup=False
    ) as live:
        passes.clear()
        passes.admit()
        asked = {"url": "/generate", "json": {**OK, "steps": 2}, "headers": {"accept": "text/event-stream"}}
        with live.client.stream("POST", **asked) as reply:
            lines = reply.iter_lines()
            assert next(lines) == "event: image"
            live.server.should_exit = True
            rest = "\n".join(lines)
        passes.set()
    *_, (name, data) = parse(f"event: image\n{rest}")
    assert (name, data["error"]["code"]) == ("error", "draining")
    assert live.metric("dd_requests_total", model="tiny", plan="dd-2", outcome="rejected") == 1
