"""`Accept: text/event-stream`: previews that become the picture."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sse_starlette.event import ServerSentEvent

from dd_core import plan
from dd_core.bundle import Bundle
from dd_core.plan import Preset
from dd_core.sampling import sample_codes
from server.api import responses
from server.api.responses import EventReply
from server.generation.planner import RefinementStep, refinement_steps
from tests.server.helpers import Gate, Running, Turnstile, busy, eventually, refused, running

EVENTS = {"accept": "text/event-stream"}
T = 64


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, by the rules of server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if "event" in fields:  # else it is a comment
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def stream(live: Running, **body: object) -> list[tuple[str, dict[str, Any]]]:
    reply = live.post({"label": "ship", "seed": 7, **body}, **EVENTS)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    return parse(reply.text)


def test_each_picture_is_that_of_its_plan_and_the_last_is_final(server: Running) -> None:
    """Budgets 1, 2, 12, 21 and 64: every picture of the stream equals the one asked for alone."""
    events = stream(server, steps=64)
    assert [name for name, _ in events] == ["image"] * 5 + ["done"]
    pictures = [data for _, data in events[:-1]]
    assert [p["plan"] for p in pictures] == [
        "dd-1",
        "dd-2",
        "pre-trained-11-21",
        "pre-trained-1-21",
        "teacher",
    ]
    assert [p["stage"] for p in pictures] == [0, 1, 2, 3, 4]
    assert [p["final"] for p in pictures] == [False] * 4 + [True]
    for picture in pictures:
        alone = server.post({"label": "ship", "seed": 7, "steps": picture["steps"]}).json()
        assert alone["plan"] == picture["plan"]
        assert alone["images"][0] == picture["image"]
    totals = [p["timings"]["total_ms"] for p in pictures]
    assert totals == sorted(totals)
    assert events[-1][1]["images"] == 1


def test_by_default_it_ends_with_the_best_plan_that_has_a_student(server: Running) -> None:
    assert [data["plan"] for name, data in stream(server) if name == "image"][-1] == "pre-trained-1-21"


def test_two_steps_cost_two_passes_in_a_stream_too(bundle_folder: Path, gate: Gate) -> None:
    """The one-step picture is decoded on the way: its pass is not run twice."""
    with running(bundle_folder, gate, warmup=False) as live:
        gate.calls[:] = []
        assert [data["plan"] for _, data in stream(live, steps=2)[:-1]] == ["dd-1", "dd-2"]
        assert len(gate.calls) == 2


def test_the_tokens_before_the_second_step_are_those_of_the_preview(bundle: Bundle) -> None:
    """What the stream promises, on the codes themselves."""
    one, two = plan.one_step(T), plan.few_steps(T, 20)
    with torch.inference_mode():
        first = sample_codes(bundle.sampler, one, [8], [(7, 0)])
        second = sample_codes(bundle.sampler, two, [8], [(7, 0)])
    assert torch.equal(first[:, :20], second[:, :20])
    assert not torch.equal(first[:, 20:], second[:, 20:])


@pytest.mark.parametrize("most", [0, 1, 3])
def test_previews_can_be_limited(server: Running, most: int) -> None:
    found = [data for name, data in stream(server, steps=21, partial_images=most) if name == "image"]
    assert len(found) == 1 + most
    assert [data["final"] for data in found] == [False] * most + [True]
    assert found[-1]["plan"] == "pre-trained-1-21"


def test_every_image_of_a_request_has_its_previews(server: Running) -> None:
    found = [data for name, data in stream(server, steps=2, n=3, format="webp") if name == "image"]
    assert sorted((data["image"]["index"], data["stage"]) for data in found) == [
        (index, stage) for index in range(3) for stage in range(2)
    ]
    first = base64.b64decode(found[0]["image"]["data"])
    assert Image.open(io.BytesIO(first)).format == "WEBP"


def test_rungs_share_a_jump_only_where_it_is_the_same() -> None:
    one, two = plan.one_step(T), plan.few_steps(T, 20)
    hybrid, teacher = plan.hybrid(T, 0, 20), plan.teacher(T)
    ladder = [Preset(p) for p in (one, two, hybrid, teacher)]
    assert refinement_steps(ladder, teacher, None) == (
        RefinementStep(two, one),
        RefinementStep(hybrid),
        RefinementStep(teacher),
    )
    assert refinement_steps(ladder, one, None) == (RefinementStep(one),)
    other_split = plan.few_steps(T, 20, split=30)
    assert refinement_steps([Preset(one), Preset(other_split)], other_split, None) == (
        RefinementStep(one),
        RefinementStep(other_split),
    )
    shared = plan.hybrid(T, 10, 20)
    assert refinement_steps([Preset(one), Preset(shared)], shared, None) == (RefinementStep(shared, one),)


def test_a_stream_that_cannot_begin_is_refused_with_its_status(bundle_folder: Path, gate: Gate) -> None:
    with (
        running(bundle_folder, gate, queue_size=1, max_images=1, warmup=False) as live,
        ThreadPoolExecutor(4) as pool,
    ):
        first = busy(live, gate, pool)
        second = pool.submit(live.post, {"label": 1})
        eventually(lambda: live.depth == 1, "the queue is full")
        refused(live.post({"label": 2}, **EVENTS), 429, "queue_full")
        gate.open.set()
        assert first.result().status_code == second.result().status_code == 200


def test_a_bad_request_for_a_stream_has_the_envelope(server: Running) -> None:
    refused(server.post({"label": "nothing"}, **EVENTS), 400, "invalid_request", "label")


def test_what_fails_on_the_way_is_an_error_event(bundle_folder: Path, gate: Gate) -> None:
    gate.open = Turnstile()  # one pass, which is the first picture
    with (
        running(bundle_folder, gate, warmup=False) as live,
        live.client.stream(
            "POST", "/generate", json={"label": 4, "seed": 1, "steps": 21}, headers=EVENTS
        ) as reply,
    ):
        lines = reply.iter_lines()
        assert next(lines) == "event: image"
        gate.poisoned.value = 4
        gate.open.set()
        rest = "\n".join(lines)
        assert "event: error" in rest
        assert '"compute_failed"' in rest
        assert "secret" not in rest
        assert "event: done" not in rest
        eventually(lambda: live.metric("dd_inflight_requests") == 0, "the stream is over")
        assert live.metric("dd_requests_total", model="tiny", plan="pre-trained-1-21", outcome="error") == 1


def test_when_the_client_leaves_the_rest_is_not_computed(bundle_folder: Path, gate: Gate) -> None:
    gate.open = Turnstile()  # one pass, which is the first picture
    with running(bundle_folder, gate, warmup=False) as live:
        with live.client.stream(
            "POST", "/generate", json={"label": 4, "seed": 1, "steps": 64}, headers=EVENTS
        ) as reply:
            assert next(reply.iter_lines()) == "event: image"
        eventually(lambda: live.metric("dd_inflight_requests") == 0, "the request is over")
        gate.open.set()
        assert live.metric("dd_requests_total", model="tiny", plan="teacher", outcome="canceled") == 1
        assert live.post({"label": 0}).status_code == 200
        assert live.metric("dd_images_total", model="tiny", plan="teacher") == 0
        assert live.metric("dd_queue_depth") == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"label": 4}),
        ("/v1/images/generations", {"prompt": "ship", "quality": "low", "stream": True}),
    ],
)
def test_a_stream_that_waits_is_kept_open_by_comments(
    bundle_folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    assert responses.PING_SECONDS < 30, "the idle time of common proxies"
    monkeypatch.setattr(responses, "PING_SECONDS", 0.05)
    with running(bundle_folder, gate, warmup=False) as live:
        gate.open.clear()
        with live.client.stream("POST", path, json=body, headers=EVENTS) as reply:
            lines = reply.iter_lines()
            assert [next(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
            gate.open.set()
            events = [line for line in lines if line.startswith("event: ")]
        assert events and "error" not in events[-1]


def test_the_time_to_the_first_picture_is_a_metric(bundle_folder: Path) -> None:
    with running(bundle_folder, warmup=False) as live:
        stream(live, steps=2)
        assert live.metric("dd_time_to_first_preview_seconds_count") == 1
        assert live.metric("dd_images_total", model="tiny", plan="dd-1") == 1
        assert live.metric("dd_images_total", model="tiny", plan="dd-2") == 1
        ok = {"model": "tiny", "plan": "dd-2", "outcome": "ok"}
        # A stream is booked after its last byte, when its reader may be gone.
        eventually(lambda: live.metric("dd_requests_total", **ok) == 1, "the stream is booked")


def test_a_device_that_dies_meanwhile_sends_no_picture_twice(bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, warmup=False) as live:
        events: list[tuple[str, dict[str, Any]]] = []

        def ask() -> None:
            events.extend(stream(live, label=3, steps=2))

        gate.open.clear()
        gate.calls[:] = []
        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: len(gate.calls) == 1, "the first pass runs")
        gate.deadly.value = 3
        gate.open.set()
        eventually(lambda: live.metric("dd_worker_restarts_total") == 1, "the device died")
        gate.deadly.value = -1
        asking.join()
    assert [data["plan"] for name, data in events if name == "image"] == ["dd-1", "dd-2"]


def test_partial_images_belong_to_a_stream(server: Running) -> None:
    refused(server.post({"label": 0, "partial_images": 1}), 400, "invalid_request", "partial_images")


def test_a_preview_says_how_long_it_waited(bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, warmup=False) as live, ThreadPoolExecutor(2) as pool:
        first = busy(live, gate, pool)
        asked = pool.submit(stream, live, steps=2)
        eventually(lambda: live.depth == 1, "the stream waits")
        time.sleep(0.2)
        gate.open.set()
        preview, final, _ = (data for _, data in asked.result())
        assert first.result().status_code == 200
    assert 200 <= preview["timings"]["queue_ms"] <= final["timings"]["queue_ms"]


def test_a_stream_shows_no_picture_worse_than_was_asked_for(server: Running) -> None:
    found = [data["plan"] for name, data in stream(server, steps=64, min_quality=35) if name == "image"]
    assert found == ["pre-trained-11-21", "pre-trained-1-21", "teacher"]


def test_a_stream_that_cannot_be_in_time_is_refused_at_once(server: Running) -> None:
    """All its plans count, not the first one alone."""
    body = {"label": 1, "seed": 1, "steps": 64, "brownout": False, "deadline_ms": 30}
    assert "would start in" in refused(server.post(body, **EVENTS), 503, "deadline_unreachable")
    assert server.metric("dd_plan_downgrades_total", requested="teacher", applied="dd-1") == 0


def test_a_model_stays_until_its_streams_have_ended(bundle_folder: Path, gate: Gate, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-for-the-admin-routes\n")
    admin = {"authorization": "Bearer a-key-for-the-admin-routes"}
    with (
        running(bundle_folder, gate, admin_keys_file=keys, warmup=False) as live,
        ThreadPoolExecutor(2) as pool,
    ):
        gate.open.clear()
        gate.calls[:] = []
        asked = pool.submit(stream, live, steps=64)
        eventually(lambda: len(gate.calls) == 1, "the first pass runs")
        gone = pool.submit(live.client.delete, "/admin/models/tiny", headers=admin)
        # Asked before that, a request would be taken, and wait for the gate that only we can open.
        eventually(lambda: not live.state.catalog.models, "it takes no more requests")
        assert live.post({"label": 0}).status_code == 404
        gate.open.set()
        assert [name for name, _ in asked.result()][-1] == "done"
        assert gone.result().status_code == 204
        assert "no model is loaded" in refused(live.post({"label": 0}), 404, "unknown_model", "model")


def test_a_stream_that_is_never_read_is_closed_all_the_same() -> None:
    """The client leaves while the head is still being sent: no event was ever asked for."""
    over: list[bool] = []

    async def events() -> AsyncGenerator[ServerSentEvent, None]:
        yield ServerSentEvent("never")

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        owned = ExitStack()
        owned.callback(lambda: over.append(True))
        scope = {"type": "http", "method": "POST"}
        sending = asyncio.create_task(EventReply(events(), owned)(scope, receive, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        sending.cancel()
        await asyncio.wait([sending])
        assert sending.cancelled()

    asyncio.run(scenario())
    assert over == [True]
