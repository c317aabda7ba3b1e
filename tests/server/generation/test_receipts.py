"""Receipts: an image again from its own file, refined, or varied."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dd_core import plan
from dd_core.bundle import Bundle
from dd_core.layout import TokenLayout
from dd_core.logits import LogitSettings
from dd_core.manifest import PresetEntry, read_manifest, write_manifest
from dd_core.noise import NoiseKey, Splice, batch_noise
from dd_core.sampling import sample_codes
from distilled_decoding.contract import MAX_SEED
from server.generation.encoder import read_receipt
from server.generation.receipts import MOST_SPLICES, Receipt, parse_receipt
from tests.mutations import changed, changes
from tests.server.helpers import Running, refused, running
from tests.server.test_cli import Run
from tests.server.test_cli import run as run
from tests.tiny import tiny_bundle

T = 64


def made(live: Running, **body: object) -> dict[str, Any]:
    reply = live.post({"label": "ship", "seed": 7, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["images"][0]


def pixels(entry: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["data"]))).convert("RGB"))


@pytest.mark.parametrize("steps", [1, 2, 12, 64])
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_receipt_repeats_its_image(server: Running, steps: int, image_format: str) -> None:
    first = made(server, steps=steps, format=image_format)
    again = server.post({"receipt": first["receipt"], "format": image_format}).json()
    assert again["seed"] == 7
    assert again["images"][0] == first
    assert again["steps"] == steps


def test_the_file_itself_holds_the_receipt(server: Running, tmp_path: Path, run: Run) -> None:
    for image_format in ("png", "jpeg", "webp"):
        entry = made(server, format=image_format)
        path = tmp_path / f"ship.{image_format}"
        path.write_bytes(base64.b64decode(entry["data"]))
        assert read_receipt(path) == entry["receipt"]
        code, said, _ = run("inspect", path)
        assert code == 0
        assert said.split("\n")[0] == entry["receipt"]
        assert "class 8, plan dd-1" in said and "seed 7, image 0" in said


def test_a_class_is_shown_by_name_where_the_model_is_known(
    server: Running, bundle_folder: Path, tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "ship.png"
    path.write_bytes(base64.b64decode(made(server)["data"]))
    assert "  class 8 (ship), plan dd-1\n" in run("inspect", path, "--model", bundle_folder)[1]
    other = tiny_bundle(tmp_path / "other", seed=1)
    assert "  class 8, plan dd-1\n" in run("inspect", path, "--model", other)[1]
    code, _, error = run("inspect", path, "--model", tmp_path)
    assert code == 2 and "no bundle" in error
    shipped = ("generate", "--label", "8", "--seed", "7", "--device", "cpu", "--out", tmp_path / "real.png")
    assert run(*shipped)[0] == 0
    assert "  class 8 (ship), plan dd-1\n" in run("inspect", tmp_path / "real.png")[1]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_a_file_without_a_receipt_says_so(tmp_path: Path, run: Run, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    code, _, error = run("inspect", path)
    assert code == 2 and error.count("\n") == 1
    Image.new("RGB", (2, 2)).save(path, "PNG")
    code, _, error = run("inspect", path)
    assert code == 2 and "holds no receipt" in error


def test_any_image_of_a_request_has_its_own(server: Running) -> None:
    several = server.post({"label": 3, "seed": 5, "n": 3, "steps": 2}).json()["images"]
    assert len({entry["receipt"] for entry in several}) == 3
    for entry in several:
        assert server.post({"receipt": entry["receipt"]}).json()["images"] == [entry]


def test_a_receipt_refines_its_image(server: Running) -> None:
    """The 2-step picture of a 1-step receipt is the one that the same seed gives with two steps."""
    first = made(server)
    refined = server.post({"receipt": first["receipt"], "steps": 2}).json()
    assert refined["plan"] == "dd-2"
    assert refined["images"][0] == made(server, steps=2)
    assert refined["images"][0] != first


def test_an_image_by_its_receipt_never_changes(server: Running) -> None:
    entry = made(server, steps=2)
    reply = server.client.get(f"/images/{entry['receipt']}")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "image/png"
    assert reply.content == base64.b64decode(entry["data"])
    assert "immutable" in reply.headers["cache-control"]
    tag = reply.headers["etag"]
    assert tag.startswith('"')
    passes = server.metric("dd_batch_size_count")
    for known in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        unchanged = server.client.get(f"/images/{entry['receipt']}", headers={"if-none-match": known})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == tag
        assert unchanged.headers["vary"] == reply.headers["vary"] == "accept"
    assert server.metric("dd_batch_size_count") == passes, "nothing was computed"
    changed = server.client.get(f"/images/{entry['receipt']}", headers={"if-none-match": '"other"'})
    assert changed.content == reply.content


@pytest.mark.parametrize(
    ("query", "accept", "kind"),
    [
        ("?format=webp", "*/*", "webp"),
        ("", "image/jpeg", "jpeg"),
        ("", "image/avif,image/webp,image/*,*/*;q=0.8", "webp"),
        ("", "text/html,*/*", "png"),
    ],
)
def test_an_image_by_its_receipt_in_other_formats(
    server: Running, query: str, accept: str, kind: str
) -> None:
    entry = made(server, format=kind)
    reply = server.client.get(f"/images/{entry['receipt']}{query}", headers={"accept": accept})
    assert reply.headers["content-type"] == f"image/{kind}"
    assert reply.content == base64.b64decode(entry["data"])
    other = server.client.get(f"/images/{entry['receipt']}?format={'jpeg' if kind != 'jpeg' else 'png'}")
    assert other.headers["etag"] != reply.headers["etag"]


def test_what_is_no_image_is_not_acceptable(server: Running) -> None:
    word = made(server)["receipt"]
    refused(
        server.client.get(f"/images/{word}", headers={"accept": "application/json"}),
        406, "not_acceptable", "accept",
    )  # fmt: skip
    reply = server.client.get(f"/images/{word}?format=gif")
    assert "png" in refused(reply, 400, "invalid_request", "format")


def test_a_damaged_receipt_is_told_from_a_good_one(server: Running) -> None:
    word = made(server)["receipt"]
    swapped = word[:20] + ("A" if word[20] != "A" else "B") + word[21:]
    for bad in (
        "x",
        word[:-3],
        swapped,
        word + "AAAA",
        "dd1.",
        "dd1.!!!!",
        "dd1." + "é" * 8,
        "dd1." + "A" * 9000,
    ):
        refused(server.post({"receipt": bad}), 400, "invalid_request", "receipt")
        if bad.isascii() and bad != "dd1.!!!!":
            refused(server.client.get(f"/images/{bad}"), 400, "invalid_request", "receipt")


def test_a_made_up_receipt_cannot_ask_for_what_is_not_there(server: Running) -> None:
    """Whoever knows the form can write any receipt: it is checked like any other input."""
    good = parse_receipt(made(server)["receipt"])
    weights, seed = good.weights, NoiseKey(7, 0)
    zero = (Splice(0, 1, 0), Splice(5, 1, 0))

    def ask(*fields: Any) -> Any:
        return server.post({"receipt": str(Receipt(*fields))})

    assert ask("tiny", weights, 8, "dd-1", seed).status_code == 200
    refused(ask("other", weights, 8, "dd-1", seed), 409, "other_weights", "receipt")
    refused(ask("tiny", "0" * 16, 8, "dd-1", seed), 409, "other_weights", "receipt")
    refused(ask("tiny", "", 8, "dd-1", seed), 409, "other_weights", "receipt")
    for plan_name in ("onestep", "nothing"):
        refused(ask("tiny", weights, 8, plan_name, seed), 409, "other_weights", "receipt")
    for fields in (
        (10, "dd-1", seed), (-1, "dd-1", seed), ("ship", "dd-1", seed),
        (8, "dd-1", NoiseKey(-1, 0)), (8, "dd-1", NoiseKey(MAX_SEED + 1, 0)),
        (8, "dd-1", NoiseKey(7, 0, zero)), (8, "dd-1", NoiseKey(7, 0, zero[:1])),
        (8, "dd-1", NoiseKey(7, 0, (Splice(64, 1, 0),))),
        (8, "dd-1", NoiseKey(7, 0, (Splice(9, 1, 0), Splice(9, 1, 0)))),
        (8, "dd-1", NoiseKey(7, 0, tuple(Splice(b + 1, 1, 0) for b in range(MOST_SPLICES + 1)))),
    ):  # fmt: skip
        refused(ask("tiny", weights, *fields), 400, "invalid_request", "receipt")


def test_every_field_of_a_receipt_may_be_anything(server: Running) -> None:
    """With a checksum that is right: the same picture, or a refusal of this field."""
    good = parse_receipt(made(server)["receipt"])
    names = ("model", "weights", "condition", "plan", "seed", "index", "splices")
    fields = dict(zip(names, ("tiny", good.weights, 8, "dd-1", 7, 0, [[5, 1, 0]]), strict=True))
    seen = set()
    for place, value in changes(fields):
        body = json.dumps(list(changed(fields, place, value).values())).encode()
        check = hashlib.blake2b(body, digest_size=6).digest()
        word = "dd1." + base64.urlsafe_b64encode(body + check).decode().rstrip("=")
        reply = server.post({"receipt": word})
        seen.add(reply.status_code)
        if reply.status_code != 200:
            assert reply.status_code in (400, 409), (place, value, reply.text)
            assert reply.json()["error"]["param"] == "receipt", (place, value, reply.text)
    assert seen == {200, 400, 409}


def test_other_weights_under_the_same_name_are_not_passed_off(server: Running, tmp_path: Path) -> None:
    word = made(server)["receipt"]
    with running(tiny_bundle(tmp_path / "again", seed=1), warmup=False) as other:
        refused(other.post({"receipt": word}), 409, "other_weights", "receipt")


def test_other_settings_or_another_plan_of_the_same_name_are_other_pictures(tmp_path: Path) -> None:
    """Weights alone do not make a picture: the guidance and the plan's second step are in its identity."""
    folder = tiny_bundle(tmp_path / "tiny")
    with running(folder, warmup=False) as live:
        one, two = made(live), made(live, steps=2)
    manifest = read_manifest(folder)
    moved = PresetEntry.of(plan.few_steps(T, 5), metrics={"fid": 40.0})
    presets = [moved if entry.name == "dd-2" else entry for entry in manifest.presets]
    write_manifest(folder, manifest.model_copy(update={"presets": presets}))
    with running(folder, warmup=False) as live:
        refused(live.post({"receipt": two["receipt"]}), 409, "other_weights", "receipt")
        refused(live.client.get(f"/images/{two['receipt']}"), 409, "other_weights", "receipt")
        assert made(live, steps=2)["receipt"] != two["receipt"]
        assert live.post({"receipt": one["receipt"]}).json()["images"] == [one]
    write_manifest(folder, manifest.model_copy(update={"draw": LogitSettings(guidance=1.5)}))
    with running(folder, warmup=False) as live:
        refused(live.post({"receipt": one["receipt"]}), 409, "other_weights", "receipt")


def test_a_receipt_does_not_get_around_min_quality(server: Running) -> None:
    word = made(server)["receipt"]
    refused(server.post({"receipt": word, "min_quality": 31}), 400, "invalid_request", "min_quality")
    assert server.post({"receipt": word, "min_quality": 50}).json()["plan"] == "dd-1"
    assert server.post({"receipt": word, "min_quality": 31, "steps": 64}).json()["plan"] == "teacher"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"label": 0}, "label"),
        ({"prompt": "a"}, "prompt"),
        ({"model": "tiny"}, "model"),
        ({"seed": 1}, "seed"),
        ({"n": 2}, "n"),
        ({"keep": 0}, "keep"),
        ({"keep": 1}, "keep"),
    ],
)
def test_a_receipt_contradicts_what_it_says_itself(server: Running, body: dict[str, Any], param: str) -> None:
    refused(server.post({"receipt": made(server)["receipt"], **body}), 400, "invalid_request", param)


def test_keep_needs_a_receipt(server: Running) -> None:
    refused(server.post({"label": 0, "keep": 0.5}), 400, "invalid_request", "keep")


@pytest.mark.parametrize("chosen", [plan.one_step(T), plan.few_steps(T, 20), plan.teacher(T, draw="flow")])
def test_a_variation_keeps_the_tokens_before_its_block(bundle: Bundle, chosen: plan.Plan) -> None:
    """The promise on the codes: the same tokens before block 32 and other ones after it, for plans of
    the student and of the teacher; and what is spliced is the other image's own noise.
    """
    keys = [NoiseKey(7, 0), NoiseKey(7, 0, (Splice(32, 9, 1),))]
    with torch.inference_mode():
        first, varied = sample_codes(bundle.sampler, chosen, [8, 8], keys)
    assert torch.equal(first[:32], varied[:32])
    assert not torch.equal(first[32:], varied[32:])
    noise, uniform = batch_noise([*keys, (9, 1)], TokenLayout.raster(T), 4)
    assert torch.equal(noise[1], torch.cat([noise[0, :32], noise[2, 32:]]))
    assert torch.equal(uniform[1], torch.cat([uniform[0, :32], uniform[2, 32:]]))


def test_variations_over_http(server: Running) -> None:
    base = made(server, steps=2)
    ask = {"receipt": base["receipt"], "keep": 0.5, "seed": 9, "n": 3}
    reply = server.post(ask).json()
    assert (reply["plan"], reply["seed"]) == ("dd-2", 9)
    assert [(entry["seed"], entry["index"]) for entry in reply["images"]] == [(9, 0), (9, 1), (9, 2)]
    shown = [pixels(entry) for entry in [base, *reply["images"]]]
    assert len({picture.tobytes() for picture in shown}) == 4
    assert server.post(ask).json()["images"] == reply["images"]
    # A variation has a receipt like every image, and can be varied in its turn.
    second = reply["images"][1]
    again = server.post({"receipt": second["receipt"]}).json()
    assert (again["images"], again["seed"]) == ([second], 9)
    deeper = server.post({"receipt": second["receipt"], "keep": 0.75, "seed": 1}).json()["images"][0]
    assert parse_receipt(deeper["receipt"]).key == NoiseKey(7, 0, (Splice(32, 9, 1), Splice(48, 1, 0)))
    # What is varied further up is drawn anew from there: the later change is gone.
    higher = server.post({"receipt": deeper["receipt"], "keep": 0.25, "seed": 2}).json()["images"][0]
    assert parse_receipt(higher["receipt"]).key == NoiseKey(7, 0, (Splice(16, 2, 0),))


def test_a_seed_for_variations_is_drawn_where_it_is_left_out(server: Running) -> None:
    ask = {"receipt": made(server)["receipt"], "keep": 0.5}
    assert server.post(ask).json()["seed"] != server.post(ask).json()["seed"]


def test_variations_of_variations_end(server: Running) -> None:
    word = made(server)["receipt"]
    for depth in range(MOST_SPLICES):
        reply = server.post({"receipt": word, "keep": (depth + 1) / 16, "seed": 1})
        word = reply.json()["images"][0]["receipt"]
    refused(server.post({"receipt": word, "keep": 0.9, "seed": 1}), 400, "invalid_request", "keep")


def test_the_largest_seeds_survive_a_receipt() -> None:
    receipt = Receipt.of(
        "m", "ab" * 32, "a café \u202e 🐈", "dd-1", NoiseKey(MAX_SEED, 255, (Splice(3, MAX_SEED, 1),))
    )
    assert parse_receipt(str(receipt)) == receipt
    assert receipt.is_of("ab" * 32) and not receipt.is_of("ac" * 32)
