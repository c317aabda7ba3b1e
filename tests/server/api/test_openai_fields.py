"""Requests as clients of other servers send them, and replies as OpenAI's own types have them."""

from __future__ import annotations

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import (
    Image,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
    Model,
)
from PIL import Image as Picture
from pydantic import BaseModel, TypeAdapter

from server.api.openai_fields import NO_EFFECT, ImagesRequest, translate
from server.generation import encoder
from server.models.catalog import ServedModel
from tests.server.generation.test_runner import parse
from tests.server.helpers import Running, refused, running
from tests.tiny import tiny_manifest

PATH = "/v1/images/generations"
SHIP = {"prompt": "ship", "quality": "low", "seed": 7}


def ask(server: Running, **body: object) -> dict[str, Any]:
    reply = server.client.post(PATH, json={**SHIP, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def pixels(data: str) -> np.ndarray:
    return np.asarray(Picture.open(io.BytesIO(base64.b64decode(data))))


def native(server: Running) -> str:
    return server.post({"label": "ship", "seed": 7}).json()["images"][0]["data"]


@pytest.mark.parametrize("size", [None, "auto", "", "32x32", 32])
def test_the_models_own_size_is_the_exact_bytes(server: Running, size: object) -> None:
    reply = ask(server, size=size)
    assert reply["data"][0]["b64_json"] == native(server)
    assert (reply["size"], reply["native_size"], reply["warnings"]) == ("32x32", "32x32", [])


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"size": "1024x1024"}, "1024x1024"),
        ({"size": "1792x1024"}, "1792x1024"),
        ({"size": "256*128"}, "256x128"),
        ({"size": 512}, "512x512"),
        ({"width": 96, "height": 64}, "96x64"),
        ({"width": 96, "height": 64, "size": "auto"}, "96x64"),
    ],
)
def test_another_size_is_resampled(server: Running, fields: dict[str, Any], size: str) -> None:
    reply = ask(server, **fields)
    assert (reply["size"], reply["native_size"], reply["warnings"]) == (size, "32x32", [])
    made, own = pixels(reply["data"][0]["b64_json"]), pixels(native(server))
    height, width = made.shape[:2]
    assert f"{width}x{height}" == size
    assert np.array_equal(made, own.repeat(height // 32, axis=0).repeat(width // 32, axis=1))


def test_a_size_that_is_no_multiple_is_smooth(server: Running) -> None:
    made = pixels(ask(server, size="50x40")["data"][0]["b64_json"])
    wanted = Picture.fromarray(pixels(native(server))).resize((50, 40), Picture.Resampling.LANCZOS)
    assert np.array_equal(made, np.asarray(wanted))


def test_previews_have_the_size_too(server: Running) -> None:
    body = {**SHIP, "quality": "high", "size": "64x64", "stream": True, "partial_images": 2}
    events = [data for _, data in parse(server.client.post(PATH, json=body).text)]
    assert [pixels(event["b64_json"]).shape for event in events] == [(64, 64, 3)] * 3
    assert {(event["size"], event["native_size"]) for event in events} == {("64x64", "32x32")}


def test_a_url_leads_to_the_resampled_picture(server: Running) -> None:
    link = ask(server, size="320x64", response_format="url")["data"][0]["url"]
    got = server.client.get(link)
    assert got.content == base64.b64decode(ask(server, size="320x64")["data"][0]["b64_json"])
    own = server.client.get(link.replace("320x64", "auto"))
    assert own.content == base64.b64decode(native(server))
    tags = {
        reply.headers["etag"] for reply in (got, own, server.client.get(link.replace("320x64", "64x320")))
    }
    assert len(tags) == 3
    plain = server.client.get(link.replace("&size=320x64", ""))
    assert plain.headers["etag"] == own.headers["etag"]
    again = server.client.get(link, headers={"if-none-match": got.headers["etag"]})
    assert (again.status_code, again.headers["etag"]) == (304, got.headers["etag"])
    assert server.client.head(link).headers["etag"] == got.headers["etag"]
    says = refused(server.client.get(link.replace("320x64", "5000x1")), 400, "invalid_request", "size")
    assert "2048" in says


def test_large_pictures_are_resampled_in_threads(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def resample(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return original(*arguments)

    original = encoder.resample
    monkeypatch.setattr(encoder, "resample", resample)
    ask(server, size="128x128")
    assert len(names) == 1 and names[0].startswith("encode")


def test_a_long_prompt_is_cut_off_and_said(text_folder: Path) -> None:
    """AIPerf's default prompts have 2,500 characters; OpenAI takes 32,000."""
    with running(text_folder, warmup=False) as live:
        long = "a red cat " * 500
        reply = live.client.post(PATH, json={**SHIP, "prompt": long}).json()
        assert [warning["param"] for warning in reply["warnings"]] == ["prompt"]
        ours = live.post({"prompt": long[:1000], "seed": 7}).json()["images"][0]
        assert (reply["data"][0]["b64_json"], reply["data"][0]["receipt"]) == (ours["data"], ours["receipt"])


def test_num_inference_steps_are_steps(server: Running) -> None:
    asked = {"prompt": "ship", "seed": 7}
    for steps, plan in ((1, "dd-1"), (21, "pre-trained-1-21"), (64, "teacher")):
        reply = server.client.post(PATH, json={**asked, "num_inference_steps": steps}).json()
        assert (reply["plan"], reply["warnings"]) == (plan, [])
        assert (
            reply["data"][0]["b64_json"]
            == (server.post({"label": "ship", "seed": 7, "steps": steps}).json()["images"][0]["data"])
        )
        assert server.client.post(PATH, json={**asked, "steps": steps}).json()["plan"] == plan


def test_more_steps_than_there_are_are_all_of_them(server: Running) -> None:
    reply = server.client.post(PATH, json={"prompt": "ship", "num_inference_steps": 200}).json()
    assert reply["plan"] == "teacher"
    [warning] = reply["warnings"]
    assert warning["param"] == "num_inference_steps" and "64" in warning["message"]


@pytest.mark.parametrize(("asked", "spent"), [(1, 21), (20, 21), (50, 50), (100, 64)])
def test_steps_that_a_model_does_not_have_are_the_nearest(asked: int, spent: int) -> None:
    manifest = tiny_manifest()
    dear = [
        p.model_copy(update={"offered": p.name in ("pre-trained-1-21", "teacher")}) for p in manifest.presets
    ]
    model = ServedModel.of(Path("unused"), manifest.model_copy(update={"presets": dear}))
    body = ImagesRequest(prompt="ship", num_inference_steps=asked)
    translation = translate(body, model)
    assert translation.wanted.steps == spent
    assert [w["param"] for w in translation.warnings] == (["num_inference_steps"] if asked != spent else [])


# Fields as the protocols of vLLM-Omni and SGLang name them, with values as their clients send them.
VLLM = {
    "negative_prompt": "blurry", "guidance_scale": 4.0, "true_cfg_scale": 4, "vae_use_slicing": False,
    "vae_use_tiling": True, "generator_device": "cpu", "lora": {"name": "x"}, "flow_shift": 3.0, "layers": 4,
    "extra_params": {}, "system_prompt": "x", "use_system_prompt": "custom", "bot_task": "cot",
    "infer_align_image_size": True, "user": "somebody",
}  # fmt: skip
SGLANG = {
    "style": "vivid", "guidance_scale": 1.0, "generator_device": "cuda", "output_quality": "default",
    "enable_teacache": False, "max_sequence_length": 512, "enable_upscaling": True, "upscaling_scale": 4,
    "upscaling_model_path": "x", "diffusers_kwargs": {}, "perf_dump_path": "/x", "progressive_mode": "x",
    "progressive_levels": 2, "progressive_delta": 0.5,
}  # fmt: skip
OPENAI = {
    "user": "somebody", "safety_identifier": "x", "moderation": "low", "style": "natural", "complexity": "low"
}  # fmt: skip


@pytest.mark.parametrize("fields", [VLLM, SGLANG, OPENAI], ids=["vllm", "sglang", "openai"])
def test_fields_without_effect_are_named(server: Running, fields: dict[str, Any]) -> None:
    reply = ask(server, **fields)
    assert reply["data"][0]["b64_json"] == native(server)
    assert {warning["param"] for warning in reply["warnings"]} == set(fields)
    assert all(warning["message"].startswith("no effect: ") for warning in reply["warnings"])
    assert ask(server, **dict.fromkeys(fields))["warnings"] == [], "null is left out"
    stream = server.client.post(PATH, json={**SHIP, **fields, "stream": True}).text
    assert parse(stream)[-1][1]["warnings"] == reply["warnings"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": "transparent"}, "background"),
        ({"output_compression": 50}, "output_compression"),
        (
            {"output_compression": 5, "output_format": "webp", "response_format": "url"},
            "output_compression",
        ),
        ({"num_inference_steps": 1, "quality": "high"}, "quality"),
        ({"width": 64, "height": 64, "size": "1024x1024"}, "size"),
    ],
)
def test_what_is_without_effect_here_is_named(server: Running, fields: dict[str, Any], param: str) -> None:
    reply = ask(server, **fields)
    assert [warning["param"] for warning in reply["warnings"]] == [param]
    assert reply["background"] == "opaque" and reply["plan"] == "dd-1"


@pytest.mark.parametrize(
    "fields", [{"background": "opaque"}, {"output_compression": 100}, {"quality": "auto"}]
)
def test_what_has_its_effect_is_not_named(server: Running, fields: dict[str, Any]) -> None:
    assert ask(server, **fields)["warnings"] == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("guidence_scale", "guidance_scale"),
        ("qualty", "quality"),
        ("num_inference_step", "num_inference_steps"),
    ],
)
def test_a_mistyped_field_is_refused_with_the_one_that_is_meant(
    server: Running, typed: str, meant: str
) -> None:
    reply = server.client.post(PATH, json={**SHIP, typed: 1})
    assert f"did you mean {meant}?" in refused(reply, 400, "invalid_request", typed)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"steps": 0, "quality": "auto"}, "steps"),
        ({"steps": 65, "quality": "auto"}, "steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1.5}, "num_inference_steps"),
        ({"steps": 2, "num_inference_steps": 2}, "steps"),
        ({"width": 64}, "height"),
        ({"height": 64}, "width"),
        ({"width": 0, "height": 5}, "width"),
        ({"size": "4096x4096"}, "size"),
        ({"size": "2048x2048", "n": 5}, "size"),
        ({"size": []}, "size"),
        ({"quality": "best"}, "quality"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(server: Running, fields: dict[str, Any], param: str) -> None:
    refused(server.client.post(PATH, json={**SHIP, **fields}), 400, "invalid_request", param)


@pytest.mark.parametrize(
    ("quality", "said"),
    [
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("standard", "medium"),
        ("hd", "high"),
        ("xhigh", "high"),
        ("max", "high"),
        ("auto", None),
        (None, None),
    ],
)
def test_quality_is_said_in_openais_words(server: Running, quality: str | None, said: str | None) -> None:
    reply = ask(server, quality=quality)
    words = {"dd-1": "low", "teacher": "high"}
    assert reply["quality"] == (said or words.get(reply["plan"], "medium"))


def strictly(kind: type[BaseModel], data: dict[str, Any]) -> None:
    """Check every field that OpenAI's type has: its clients themselves build replies without a check."""
    TypeAdapter(kind).validate_json(json.dumps(data), strict=True)


@pytest.mark.parametrize("quality", ["auto", "hd", "standard", "low", "max"])
@pytest.mark.parametrize("form", ["b64_json", "url"])
def test_a_reply_is_of_openais_type(server: Running, quality: str, form: str) -> None:
    reply = ask(server, quality=quality, response_format=form, size="64x48", user="x", n=2)
    strictly(ImagesResponse, reply)
    for entry in reply["data"]:
        strictly(Image, entry)
    assert reply["usage"] == {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "total_tokens": 0,
    }


@pytest.mark.parametrize("quality", ["auto", "hd", "standard", "low", "max"])
def test_events_are_of_openais_types(server: Running, quality: str) -> None:
    body = {**SHIP, "quality": quality, "size": "64x48", "stream": True, "partial_images": 3}
    events = parse(server.client.post(PATH, json=body).text)
    for name, data in events:
        partial = name == "image_generation.partial_image"
        strictly(ImageGenPartialImageEvent if partial else ImageGenCompletedEvent, data)
    assert events[-1][0] == "image_generation.completed"


def test_models_are_of_openais_type(server: Running) -> None:
    for entry in server.client.get("/v1/models").json()["data"]:
        strictly(Model, entry)


def test_every_field_without_effect_has_one_reason() -> None:
    names = [name for names in NO_EFFECT.values() for name in names]
    assert len(names) == len(set(names))
    assert set(names) == {*VLLM, *SGLANG, *OPENAI, "prompt_rewriter"}
