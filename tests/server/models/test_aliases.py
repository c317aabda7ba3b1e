"""Other names of models: `--served-model-name`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dd_core.errors import InvalidRequestError
from dd_core.manifest import read_manifest, write_manifest
from server.app import create_app
from server.models.catalog import find
from server.settings import Settings, load_settings
from tests.server.helpers import OK, Running, refused, running
from tests.tiny import tiny_bundle

ASKED = {"prompt": "ship", "seed": 7, "quality": "low"}
PATH = "/v1/images/generations"
KEY = {"authorization": "Bearer admin-key-of-a-test"}


@pytest.mark.parametrize(
    ("text", "aliases"),
    [
        ("", {}),
        ("a=x", {"x": "a"}),
        ("a=x,b=y", {"x": "a", "y": "b"}),
        (" a = x , y ,b=z,", {"x": "a", "y": "a", "z": "b"}),
        ("a=x,a=x", {"x": "a"}),
        ("a=openai/dall-e-3", {"openai/dall-e-3": "a"}),
    ],
)
def test_pairs_are_read(text: str, aliases: dict[str, str]) -> None:
    assert load_settings(served_model_name=text).aliases == aliases


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dall-e-3", "write NAME=ALIAS"),
        ("a=", "write NAME=ALIAS"),
        ("=x", "write NAME=ALIAS"),
        ("a=x,b=x", "x would be an alias of both a and b"),
    ],
)
def test_what_is_no_pair_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refusal:
        load_settings(served_model_name=text)
    assert refusal.value.param == "served_model_name"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cifar=dall-e-3", "gives cifar the alias dall-e-3, but serves no model cifar: there is tiny"),
        ("tiny=tiny", "gives tiny the alias tiny, which is a model's own name"),
    ],
)
def test_an_alias_that_cannot_be_is_refused_at_the_start(bundle_folder: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        create_app(Settings(served_model_name=text), [find(bundle_folder)])


@pytest.fixture(scope="module")
def live(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("ops:admin-key-of-a-test\n")
    names = "tiny=dall-e-3,gpt-image-1,tiny=openai/any"
    with running(bundle_folder, warmup=False, admin_keys_file=keys, served_model_name=names) as live:
        yield live


@pytest.mark.parametrize("alias", ["dall-e-3", "gpt-image-1", "openai/any"])
def test_an_alias_is_the_model(live: Running, alias: str) -> None:
    made = live.post(OK).json()
    reply = live.post({**OK, "model": alias}).json()
    assert (reply["model"], reply["images"]) == ("tiny", made["images"])
    body = {**ASKED, "model": alias, "response_format": "b64_json"}
    reply = live.client.post(PATH, json=body).json()
    assert (reply["model"], reply["data"][0]["b64_json"]) == ("tiny", made["images"][0]["data"])
    assert reply["data"][0]["receipt"] == made["images"][0]["receipt"]
    shown = live.client.get(f"/v1/models/{alias}").json()
    assert (shown["id"], shown["root"]) == (alias, "tiny")


def test_as_with_openai_dall_e_sends_links_unless_asked(live: Running) -> None:
    def sent(**body: object) -> set[str]:
        return set(live.client.post(PATH, json={**ASKED, **body}).json()["data"][0]) - {"receipt", "seed"}

    assert sent(model="dall-e-3") == sent(model="dall-e-3", response_format=None) == {"url"}
    assert sent(model="dall-e-3", response_format="b64_json") == sent(model="gpt-image-1") == {"b64_json"}
    assert sent() == sent(model="tiny") == {"b64_json"}
    stream = live.client.post(PATH, json={**ASKED, "model": "dall-e-3", "stream": True}).text
    assert "b64_json" in stream


def test_aliases_are_listed(live: Running) -> None:
    entries = live.client.get("/v1/models").json()["data"]
    assert [(entry["id"], entry["root"]) for entry in entries] == [
        ("tiny", "tiny"),
        ("dall-e-3", "tiny"),
        ("gpt-image-1", "tiny"),
        ("openai/any", "tiny"),
    ]
    assert live.client.get("/v1/models/").json()["data"] == entries
    [model] = live.client.get("/models").json()["models"]
    assert model["aliases"] == ["dall-e-3", "gpt-image-1", "openai/any"]


def test_another_name_is_refused_with_names_and_aliases(live: Running) -> None:
    says = refused(live.post({**OK, "model": "dall-e-2"}), 404, "unknown_model", "model")
    assert "dall-e-3, gpt-image-1, openai/any, tiny" in says


def test_aliases_come_and_go_with_their_model(live: Running, bundle_folder: Path, tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "other")
    write_manifest(folder, read_manifest(folder).model_copy(update={"name": "dall-e-3"}))
    reply = live.client.post("/admin/models", json={"model": str(folder)}, headers=KEY)
    assert "is an alias of the model tiny" in refused(reply, 409, "conflict", "model")
    refused(live.client.delete("/admin/models/dall-e-3", headers=KEY), 404, "unknown_model", "name")
    assert live.client.delete("/admin/models/tiny", headers=KEY).status_code == 204
    refused(live.post({**OK, "model": "dall-e-3"}), 404, "unknown_model", "model")
    assert live.client.get("/v1/models").json()["data"] == []
    reply = live.client.post("/admin/models", json={"model": str(bundle_folder)}, headers=KEY)
    assert reply.json()["aliases"] == ["dall-e-3", "gpt-image-1", "openai/any"]
    assert live.post({**OK, "model": "dall-e-3"}).json()["model"] == "tiny"
