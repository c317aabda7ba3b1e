"""`POST /generate`: what it promises to those who ask properly."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dd_core.bundle import Bundle
from dd_core.sampling import sample_images
from distilled_decoding.contract import GenerateRequest
from tests.server.helpers import Gate, Running, busy, eventually, refused, running

Body = dict[str, Any]


def pixels_of(reply: Any, index: int = 0) -> np.ndarray:
    data = base64.b64decode(reply.json()["images"][index]["data"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_json_reply_has_every_field_of_the_contract(server: Running) -> None:
    reply = server.post({"label": "ship", "seed": 7})
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"id", "model", "plan", "steps", "requested_plan", "seed", "images", "timings"}
    assert body["requested_plan"] == "dd-1"
    assert (body["model"], body["plan"], body["steps"], body["seed"]) == ("tiny", "dd-1", 1, 7)
    assert body["id"] == reply.headers["x-request-id"]
    [image] = body["images"]
    data, receipt = image.pop("data"), image.pop("receipt")
    assert receipt.startswith("dd1.")
    assert image == {"index": 0, "seed": 7, "format": "png", "width": 32, "height": 32}
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)
    times = body["timings"]
    assert set(times) == {"queue_ms", "compute_ms", "encode_ms", "total_ms"}
    assert times["compute_ms"] > 0
    assert times["queue_ms"] + times["compute_ms"] + times["encode_ms"] <= times["total_ms"] + 0.01


def test_the_image_is_the_one_of_the_sampling_loop(server: Running, bundle: Bundle) -> None:
    plan = next(p.plan for p in bundle.presets if p.plan.name == "dd-2")
    expected = sample_images(bundle.sampler, plan, [8], [(11, 0)])[0].numpy()
    assert np.array_equal(pixels_of(server.post({"label": 8, "seed": 11, "steps": 2})), expected)


@pytest.mark.parametrize("label", [8, "ship", "SHIP", " Ship "])
def test_a_class_goes_by_index_or_by_name_in_any_case(server: Running, label: int | str) -> None:
    expected = pixels_of(server.post({"label": "ship", "seed": 1}))
    assert np.array_equal(pixels_of(server.post({"label": label, "seed": 1})), expected)
    assert not np.array_equal(pixels_of(server.post({"label": "frog", "seed": 1})), expected)


@pytest.mark.parametrize(
    ("steps", "plan", "spent"),
    [
        (1, "dd-1", 1),
        (2, "dd-2", 2),
        (11, "dd-2", 2),
        (12, "pre-trained-11-21", 12),
        (21, "pre-trained-1-21", 21),
        (63, "pre-trained-1-21", 21),
        (64, "teacher", 64),
    ],
)
def test_a_budget_gets_the_best_plan_within_it(server: Running, steps: int, plan: str, spent: int) -> None:
    body = server.post({"label": 0, "seed": 0, "steps": steps}).json()
    assert (body["plan"], body["steps"]) == (plan, spent)


def test_image_i_is_a_function_of_seed_and_i(server: Running) -> None:
    several = server.post({"label": "cat", "seed": 5, "n": 4})
    fewer = server.post({"label": "cat", "seed": 5, "n": 2})
    images = [image["data"] for image in several.json()["images"]]
    assert [image["index"] for image in several.json()["images"]] == [0, 1, 2, 3]
    assert len(set(images)) == 4
    assert [image["data"] for image in fewer.json()["images"]] == images[:2]


def test_a_seed_that_is_left_out_is_drawn_and_reported(server: Running) -> None:
    first, second = server.post({"label": "dog"}), server.post({"label": "dog"})
    seed = first.json()["seed"]
    assert seed != second.json()["seed"]
    assert np.array_equal(pixels_of(server.post({"label": "dog", "seed": seed})), pixels_of(first))


@pytest.mark.parametrize("seed", [2**53 - 1, str(2**53 - 1), "7", "007"])
def test_a_seed_may_be_text(server: Running, seed: int | str) -> None:
    reply = server.post({"label": 0, "seed": seed}).json()
    assert reply["seed"] == int(seed)
    assert "seed_text" not in reply
    assert reply["images"] == server.post({"label": 0, "seed": int(seed)}).json()["images"]


@pytest.mark.parametrize("seed", [2**53, 2**60 + 1, 2**63 - 1])
def test_a_seed_that_is_no_number_of_javascripts_goes_and_comes_as_text(server: Running, seed: int) -> None:
    """As a number, JSON.parse reads another one without a word: its images could not be had again."""
    reply = server.post({"label": 0, "seed": str(seed)})
    body = reply.json()
    [image] = body["images"]
    for entry in (body, image):
        assert (entry["seed"], entry["seed_text"]) == (seed, str(seed))
    as_javascript = int(float(seed))
    again = server.post({"label": 0, "seed": as_javascript})
    assert "text" in refused(again, 400, "invalid_request", "seed")
    raw = server.post({"label": 0, "seed": str(seed)}, accept="image/png")
    assert raw.headers["x-dd-seed"] == str(seed)
    assert "x-dd-seed-text" not in raw.headers
    events = server.post({"label": 0, "seed": str(seed)}, accept="text/event-stream").text
    assert f'"seed_text":"{seed}"' in events
    openai = server.client.post(
        "/v1/images/generations", json={"prompt": "airplane", "seed": str(seed)}
    ).json()
    assert (openai["data"][0]["seed"], openai["data"][0]["seed_text"]) == (seed, str(seed))
    # Receipts of such seeds stay what they are.
    repeated = server.post({"receipt": image["receipt"]}).json()
    assert repeated["images"] == [image]
    assert repeated["seed_text"] == str(seed)


def test_drawn_seeds_are_numbers_of_javascripts(server: Running) -> None:
    assert all(server.post({"label": 0}).json()["seed"] < 2**53 for _ in range(8))


@pytest.mark.parametrize(("name", "pillow"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_raw_bytes_with_the_facts_in_headers(server: Running, name: str, pillow: str) -> None:
    reply = server.post({"label": "ship", "seed": 7, "steps": 2}, accept=f"image/{name}")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == f"image/{name}"
    assert Image.open(io.BytesIO(reply.content)).format == pillow
    facts = {
        key.removeprefix("x-dd-"): value for key, value in reply.headers.items() if key.startswith("x-dd-")
    }
    assert {k: facts[k] for k in ("model", "plan", "steps", "seed", "index")} == {
        "model": "tiny",
        "plan": "dd-2",
        "steps": "2",
        "seed": "7",
        "index": "0",
    }
    assert facts["id"] == reply.headers["x-request-id"]
    assert all(float(facts[f"{part}-ms"]) >= 0 for part in ("queue", "compute", "encode", "total"))
    in_json = server.post({"label": "ship", "seed": 7, "steps": 2, "format": name}).json()["images"][0]
    assert base64.b64decode(in_json["data"]) == reply.content


def test_a_client_may_bring_its_own_request_id(server: Running) -> None:
    reply = server.post({"label": 0}, **{"x-request-id": "trace-1.a_B"})
    assert reply.json()["id"] == reply.headers["x-request-id"] == "trace-1.a_B"
    forged = server.post({"label": 0}, **{"x-request-id": "a b"})
    assert forged.headers["x-request-id"] != "a b"


MIXED: Sequence[Body] = [
    {"label": label, "seed": seed, "steps": steps, "n": n}
    for seed, (label, steps, n) in enumerate(
        [
            ("ship", 1, 1),
            ("cat", 1, 3),
            ("dog", 2, 1),
            (0, 12, 2),
            (9, 1, 1),
            ("frog", 2, 4),
            (4, 64, 1),
            (7, 1, 2),
        ]
    )
]


def test_the_same_seed_gives_the_same_bytes_alone_and_among_concurrent_requests(
    bundle_folder: Path, gate: Gate
) -> None:
    """Alone, in a batch with others of its plan, beside other plans, and cut by the batch limit."""
    with running(bundle_folder, gate, max_batch=4) as live:
        alone = [[image["data"] for image in live.post(body).json()["images"]] for body in MIXED]
        with ThreadPoolExecutor(1 + len(MIXED)) as pool:
            busy(live, gate, pool)
            replies = [pool.submit(live.post, body) for body in MIXED]
            eventually(lambda: live.depth == sum(body["n"] for body in MIXED), "all requests wait")
            gate.open.set()
            together = [[image["data"] for image in reply.result().json()["images"]] for reply in replies]
        assert together == alone
        assert 1 < max(len(call) for call in gate.calls) <= 4, "no two requests shared a batch"


def test_requests_that_wait_together_are_computed_together(bundle_folder: Path, gate: Gate) -> None:
    with running(bundle_folder, gate, max_batch=8, warmup=False) as live, ThreadPoolExecutor(7) as pool:
        first = busy(live, gate, pool)
        others = [pool.submit(live.post, {"label": label, "seed": 0}) for label in range(1, 7)]
        eventually(lambda: live.depth == 6, "six requests wait")
        gate.open.set()
        assert all(reply.result().status_code == 200 for reply in [first, *others])
        assert sorted(gate.calls[-1]) == [1, 2, 3, 4, 5, 6]
        assert live.metric("dd_queue_depth") == 0
        assert live.metric("dd_requests_total", model="tiny", plan="dd-1", outcome="ok") == 7


def test_null_is_left_out_in_every_field(server: Running) -> None:
    """Clients that write all their fields write null where they have nothing to say."""
    wanted = {"label": "ship", "seed": 7}
    nulls = {name: None for name in GenerateRequest.model_fields if name not in wanted}
    reply = server.post({**wanted, **nulls})
    assert reply.status_code == 200, reply.text
    assert reply.json()["images"] == server.post(wanted).json()["images"]
