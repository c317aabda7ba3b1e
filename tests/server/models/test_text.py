"""Models that read prompts, beside one of classes."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from dd_core.bundle import Bundle, load_bundle
from dd_core.errors import InvalidRequestError
from dd_core.sampling import sample_images
from dd_core.text.config import T5Config
from server.generation.encoder import read_receipt
from server.models.catalog import ServedModel, check_encoder, find
from tests.server.generation.test_runner import EVENTS, parse
from tests.server.helpers import Running, refused, running
from tests.server.test_cli import Run
from tests.server.test_cli import run as run
from tests.tiny_text import EXAMPLES, tiny_text_bundle, tiny_text_manifest

OURS = ("dd_", "uvicorn")  # not what the client of the same process logs
CAT = {"prompt": "a red cat", "seed": 7}


@pytest.fixture(scope="module")
def text_bundle(text_folder: Path) -> Bundle:
    return load_bundle(text_folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def texts(text_folder: Path) -> Iterator[Running]:
    """A server of the text model alone."""
    with running(text_folder, brownout_ms=0) as live:  # on a busy machine a cheaper plan is other bytes
        yield live


@contextmanager
def both(bundle_folder: Path, text_folder: Path, **settings: object) -> Iterator[Running]:
    with running([find(bundle_folder), find(text_folder)], **settings) as live:
        yield live


def images(live: Running, **body: object) -> list[str]:
    reply = live.post(body)
    assert reply.status_code == 200, reply.text
    return [image["data"] for image in reply.json()["images"]]


def test_a_prompt_gives_the_picture_of_the_sampling_loop(texts: Running, text_bundle: Bundle) -> None:
    assert text_bundle.text is not None
    for preset in text_bundle.presets:
        expected = sample_images(
            text_bundle.sampler, preset.plan, text_bundle.text.encode(["a red cat"]), [(7, 0)]
        )
        [data] = images(texts, **CAT, steps=preset.plan.cost)
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        assert np.array_equal(shown, expected[0].numpy()), preset.plan.name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red cat, 2 hearts!", "a-red-cat-2-hearts-7-0.webp"),
        ("Crème brûlée", "creme-brulee-7-0.webp"),
        ('../../etc/passwd";x=', "etc-passwd-x-7-0.webp"),
        ("❤️ 红心", "tiny-text-7-0.webp"),
        ("red heart " * 99, "-".join(["red-heart"] * 6) + "-7-0.webp"),
    ],
)
def test_a_picture_has_the_name_of_its_prompt(texts: Running, prompt: str, name: str) -> None:
    reply = texts.post({"prompt": prompt, "seed": 7}, accept="image/webp")
    assert reply.headers["content-disposition"] == f'inline; filename="{name}"'
    again = texts.client.get(f"/images/{reply.headers['x-dd-receipt']}")
    assert again.headers["content-disposition"] == f'inline; filename="{name.replace("webp", "png")}"'


def test_a_long_receipt_stays_out_of_the_head(texts: Running, tmp_path: Path) -> None:
    """nginx has 4 KiB for the head of a reply, as it comes."""
    reply = texts.post({"prompt": "\U0001f600" * 1000, "seed": 7}, accept="image/png")
    assert "x-dd-receipt" not in reply.headers
    (tmp_path / "long.png").write_bytes(reply.content)
    receipt = read_receipt(tmp_path / "long.png")
    assert len(receipt) > 5000
    again = texts.client.get(f"/images/{receipt}")
    assert again.content == reply.content
    longest = texts.post({"prompt": "x" * 1000, "seed": 2**53 - 1}, accept="image/png")
    assert longest.headers["x-dd-receipt"], "plain letters fit"
    for each in (reply, again, longest):
        assert sum(len(name) + len(value) + 4 for name, value in each.headers.raw) < 4000


def test_other_words_give_another_picture(texts: Running) -> None:
    assert images(texts, **CAT) != images(texts, **{**CAT, "prompt": "blue hearts"})
    assert images(texts, **CAT) == images(texts, **{**CAT, "prompt": "  a red\n\tcat "}), (
        "blanks are no words"
    )


def test_prompts_share_batches_and_keep_their_bytes(texts: Running) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": seed, "steps": steps, "n": 2}
        for seed, (prompt, steps) in enumerate(
            [
                ("a red cat", 1),
                ("blue dog", 1),
                ("a heart", 2),
                ("red and blue", 21),
                ("a red cat", 64),
                ("dogs", 1),
            ]
        )
    ]
    alone = [images(texts, **body) for body in bodies]
    with ThreadPoolExecutor(len(bodies) * 3) as pool:
        together = list(pool.map(lambda body: images(texts, **body), bodies * 3))
    assert together == alone * 3


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": " \n\t\u3000"}, "prompt", "empty"),
        ({"prompt": "\ufeff"}, "prompt", "empty"),
        ({"prompt": "x" * 1001}, "prompt", "1001 characters, the most is 1000"),
        ({"prompt": 5}, "prompt", "string"),
        ({"label": "ship"}, "label", "send prompt"),
        ({"label": 1, "prompt": "a"}, "prompt", "not both"),
    ],
)
def test_what_is_no_prompt_is_refused(texts: Running, body: dict[str, Any], param: str, says: str) -> None:
    assert says in refused(texts.post(body), 400, "invalid_request", param)


def test_a_prompt_of_100_kb_is_too_large_a_body(texts: Running) -> None:
    refused(texts.post({"prompt": "cat " * 25_000}), 413, "body_too_large")


@pytest.mark.parametrize(
    "prompt",
    [
        "🐈 😀",
        "قطة حمراء",
        "\u202eevil\u202c cat",
        "a\x00\x07\x1b[31mcat",
        "猫",
        "e\u0301" * 100,
        "'; DROP TABLE",
        "%s {0}",
    ],
)
def test_strange_prompts_give_a_picture(texts: Running, prompt: str) -> None:
    assert len(images(texts, prompt=prompt, seed=1)) == 1


def test_half_a_character_is_a_clear_error(texts: Running) -> None:
    reply = texts.client.post(
        "/generate", content=b'{"prompt": "\\ud800"}', headers={"content-type": "application/json"}
    )
    refused(reply, 400, "invalid_json")


def test_a_receipt_holds_the_prompt(texts: Running) -> None:
    prompt = 'a red cat \u202e 🐈 "quoted" ' + "and dogs " * 90
    first = texts.post({"prompt": prompt, "seed": 3, "steps": 2}).json()
    receipt = first["images"][0]["receipt"]
    assert texts.post({"receipt": receipt}).json()["images"] == first["images"]
    reply = texts.client.get(f"/images/{receipt}")
    assert reply.content == base64.b64decode(first["images"][0]["data"])
    varied = texts.post({"receipt": receipt, "keep": 0.5, "seed": 1})
    assert varied.status_code == 200


def test_a_stream_refines_a_prompt(texts: Running) -> None:
    events = parse(texts.post({**CAT, "steps": 64}, **EVENTS).text)
    assert [data["plan"] for name, data in events if name == "image"] == [
        "dd-1", "dd-2", "pre-trained-1-21", "teacher",
    ]  # fmt: skip
    assert events[0][1]["image"]["data"] == images(texts, **CAT)[0]


def test_models_say_that_they_read_text(texts: Running) -> None:
    [model] = texts.client.get("/models").json()["models"]
    assert (model["conditioning"], model["classes"], model["examples"]) == ("text", [], EXAMPLES)
    assert model["limits"] == {"n": 16, "prompt": 1000}


def test_side_by_side_what_is_sent_says_which_model(bundle_folder: Path, text_folder: Path) -> None:
    with both(bundle_folder, text_folder) as live:
        assert live.post({"label": "ship"}).json()["model"] == "tiny"
        assert live.post({"prompt": "a cat"}).json()["model"] == "tiny-text"
        assert live.post({"prompt": "a cat", "model": "tiny-text"}).json()["model"] == "tiny-text"
        refused(live.post({"prompt": "a cat", "model": "tiny"}), 400, "invalid_request", "prompt")
        refused(live.post({"label": 1, "model": "tiny-text"}), 400, "invalid_request", "label")
        assert "tiny, tiny-text" in refused(live.post({}), 400, "invalid_request", "model")
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
            drawn = client.images.generate(prompt="a red cat", quality="low", extra_body={"seed": 7})
            assert drawn.data[0].b64_json == live.post({**CAT}).json()["images"][0]["data"]  # type: ignore[index]
            named = client.images.generate(model="tiny", prompt="ship", quality="low", extra_body={"seed": 7})
            ship = live.post({"label": "ship", "seed": 7}).json()["images"][0]["data"]
            assert named.data[0].b64_json == ship  # type: ignore[index]
            # As docs/02-http-api.md says: without a model, also a class's name is a prompt.
            unnamed = client.images.generate(prompt="ship", quality="low", extra_body={"seed": 7})
            written = live.post({"prompt": "ship", "seed": 7}).json()["images"][0]["data"]
            assert unnamed.data[0].b64_json == written != ship  # type: ignore[index]
            assert {model.id for model in client.models.list()} == {"tiny", "tiny-text"}


def test_reading_prompts_is_a_metric_and_is_done_once(text_folder: Path) -> None:
    with running(text_folder, warmup=False) as live:
        live.post(CAT)
        assert live.metric("dd_text_encode_seconds_count") == 1
        text = live.client.get("/metrics").text
        assert "red cat" not in text, "a prompt is no label"


def test_prompts_are_logged_only_where_a_setting_says_so(
    text_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for wanted in (False, True):
        caplog.clear()
        with running(text_folder, warmup=False, log_prompts=wanted) as live:
            drawn = live.post({"prompt": "a very secret cat"})
            assert drawn.status_code == 200
            word = drawn.json()["images"][0]["receipt"]
            assert live.client.get(f"/images/{word}").status_code == 200
            refused(live.post({"prompt": "secret" * 500}), 400, "invalid_request", "prompt")
        lines = [
            json.dumps([r.getMessage(), getattr(r, "fields", None)])
            for r in caplog.records
            if r.name.startswith(OURS)
        ]
        assert any("secret" in line for line in lines) is wanted
        assert not any(word in line for line in lines), "a receipt holds its prompt"


def test_the_command_draws_prompts_too(texts: Running, text_folder: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "cat.png"
    code, said, _ = run(
        "generate",
        "--prompt",
        "a red cat",
        "--seed",
        7,
        "--model",
        text_folder,
        "--device",
        "cpu",
        "--out",
        out,
    )
    assert code == 0 and "a red cat" in said
    assert out.read_bytes() == base64.b64decode(images(texts, **CAT)[0])
    code, said, _ = run("inspect", out)
    assert code == 0 and "prompt a red cat" in said
    code, _, error = run("generate", "--label", "ship", "--model", text_folder, "--out", out)
    assert code == 2 and "send prompt" in error


def test_a_bundle_without_an_encoder_is_refused(tmp_path: Path) -> None:
    folder = tiny_text_bundle(tmp_path / "x", text=None)
    with pytest.raises(InvalidRequestError, match="names no encoder"):
        find(folder)


def test_t5_without_its_library_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = tiny_text_manifest(text=T5Config(repo="a/b", length=8, dim=32))
    monkeypatch.setattr("server.models.catalog.find_spec", lambda _: None)
    with pytest.raises(InvalidRequestError, match=r"distilled-decoding\[t5\]"):
        check_encoder(manifest)
    monkeypatch.setattr("server.models.catalog.find_spec", lambda _: object())
    check_encoder(manifest)


def test_a_prompt_that_t5_would_clean_away_is_refused_before_it_waits() -> None:
    manifest = tiny_text_manifest(text=T5Config(repo="a/b", length=8, dim=32))
    model = ServedModel.of(Path("x"), manifest)
    assert model.condition(None, "a cat") == "a cat"
    with pytest.raises(InvalidRequestError, match="nothing of the prompt is left"):
        model.condition(None, "https://a.example/cat.png")
