"""Published models through the commands: pull, convert, serve, generate, models."""

from __future__ import annotations

import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer

from dd_core.bundle import load_bundle
from dd_core.errors import InvalidRequestError
from dd_core.hub.registry import registry
from dd_core.hub.spec import ModelSpec
from dd_core.hub.storage import models_folder
from dd_core.manifest import read_manifest
from dd_core.models.config import LlamaGenConfig, VARConfig
from dd_core.text.config import T5Config
from server.models import catalog as models
from tests.dd_core.small_text import pieces_file
from tests.hub import COMMIT, FakeHub, content_of, publish, random_modules, saved, tiny_spec
from tests.hub_fixtures import point_at
from tests.server.helpers import running
from tests.server.test_cli import Run
from tests.server.test_cli import run as run

NAME = "var-dd-d16"


@pytest.fixture
def spec(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """The name stands for a tiny model of the same kind, which the stand-in for the hub has."""
    tiny = tiny_spec(NAME)
    monkeypatch.setitem(registry(), NAME, tiny)
    publish(hub, tiny, random_modules(tiny))
    return tiny


def test_generate_fetches_a_published_model_once(
    run: Run, hub: FakeHub, spec: ModelSpec, tmp_path: Path
) -> None:
    arguments = ("--model", NAME, "--label", "ship", "--device", "cpu", "--seed", 7)
    code, said, error = run("generate", *arguments, "--steps", 2, "--out", tmp_path / "a.png")
    assert code == 0, error
    assert "ship" in said and "dd-2" in said
    asked = hub.asked.total()
    assert run("generate", *arguments, "--steps", 2, "--out", tmp_path / "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert hub.asked.total() == asked


def test_a_server_of_a_published_model_answers_and_names_its_figures(hub: FakeHub, spec: ModelSpec) -> None:
    with running(models.find(NAME)) as live:
        reply = live.post({"label": "Ship", "steps": 3, "seed": 1})
        assert reply.status_code == 200 and reply.json()["model"] == NAME
        entry = live.client.get("/models").json()["models"][0]
        assert all(plan["published"] for plan in entry["plans"])
        assert "MIT" in entry["licence"]
    asked = hub.asked.total()
    models.find(NAME)
    assert hub.asked.total() == asked


def test_pull_says_what_came_from_where(run: Run, hub: FakeHub, spec: ModelSpec) -> None:
    code, said, _ = run("pull", NAME, "--no-teacher")
    assert code == 0
    assert f"student: microsoft/distilled_decoding/VAR-DD/var-d16.pth, 1 MB, revision {COMMIT}" in said
    assert "var_d16.pth" not in said
    assert hub.asked["GET FoundationVision/var/var_d16.pth"] == 0


def test_convert_takes_files_at_hand_and_the_rest_from_the_hub(
    run: Run, hub: FakeHub, spec: ModelSpec, tmp_path: Path
) -> None:
    other = random_modules(spec, seed=1)["student"]
    (tmp_path / "mine.pth").write_bytes(saved(content_of(spec, "student", other)))
    code, said, error = run("convert", NAME, "--student", tmp_path / "mine.pth", "--unmasked-prefix")
    assert code == 0, error
    folder = models_folder() / NAME
    assert said.startswith(f"{folder}: {NAME}, ")
    manifest = read_manifest(folder)
    assert [s.repo is None for s in manifest.sources] == [False, True, False]
    assert isinstance(manifest.teacher, VARConfig) and not manifest.teacher.prefix_mask
    assert hub.asked["GET microsoft/distilled_decoding/VAR-DD/var-d16.pth"] == 0
    code, _, _ = run("convert", NAME, "--no-teacher", "--to", tmp_path / "alone")
    assert code == 0 and read_manifest(tmp_path / "alone").teacher is None


def test_convert_of_local_files_needs_no_hub(run: Run, hub: FakeHub, spec: ModelSpec, tmp_path: Path) -> None:
    options: list[object] = []
    for part, module in random_modules(spec).items():
        path = tmp_path / f"{part}.pt"
        path.write_bytes(saved(content_of(spec, part, module)))
        options += [f"--{part}", path]
    assert run("convert", NAME, *options)[0] == 0
    assert not hub.asked


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("pull", "var-dd-d17"), 2, "did you mean var-dd-d16"),
        (("convert", NAME, "--student", "gone.pth"), 1, "gone.pth: No such file"),
        (("convert", "var-d16", "--student", "gone.pth"), 2, "takes no student"),
        (("convert", "var-d16", "--no-teacher"), 2, "teacher alone"),
        (("convert", "llamagen-dd-l", "--unmasked-prefix"), 2, "no VAR teacher"),
        (("pull", "var-d36"), 1, "has no file var_d36.pth"),
        (("generate", "--model", "var-d36", "--label", "0", "--out", "a.png"), 1, "has no file var_d36.pth"),
        (("serve", "llamagen-t2i-256", "--port", "0"), 2, "distilled-decoding[t5]"),
        (("serve", "nothing", "--port", "0"), 2, "no bundle 'nothing'"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    run: Run,
    hub: FakeHub,
    spec: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr("server.models.catalog.find_spec", lambda _: None)  # as without the extra t5
    got, _, error = run(*arguments)
    assert (got, error.count("\n")) == (code, 1), error
    assert error.startswith("dd-server: error:") and says in error


def _publish_student(hub: FakeHub, spec: ModelSpec, change: Callable[[Any], object]) -> None:
    content = content_of(spec, "student", random_modules(spec)["student"])
    change(content["trainer"]["ema_parameters"])
    remote = spec.files["student"]
    hub.add(remote.repo, remote.file, saved(content))


def _full(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, spec: ModelSpec) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))


def _unreachable(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, spec: ModelSpec) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9")


def _breaking_off(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, spec: ModelSpec) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(hub, "cut_after", [1000] + [0] * 9)
    monkeypatch.setattr(logging.getLogger("huggingface_hub.file_download"), "disabled", True)


def _damaged_on_the_way(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, spec: ModelSpec) -> None:
    monkeypatch.setattr(hub, "damage", True)


def _truncated(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, spec: ModelSpec) -> None:
    key = "FoundationVision/var/var_d16.pth"
    monkeypatch.setitem(hub.files, key, hub.files[key][:-40])


def _missing_key(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, spec: ModelSpec) -> None:
    monkeypatch.setattr(hub, "files", dict(hub.files))
    _publish_student(hub, spec, lambda state: state.pop("head.bias"))


def _wrong_shape(monkeypatch: pytest.MonkeyPatch, hub: FakeHub, spec: ModelSpec) -> None:
    monkeypatch.setattr(hub, "files", dict(hub.files))
    _publish_student(hub, spec, lambda state: state.update({"head.bias": torch.zeros(3)}))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_unreachable, "cannot be reached"),
        (_breaking_off, "to go on where it ended"),
        (_damaged_on_the_way, "the hub says"),
        (_truncated, "var_d16.pth: damaged, or not a torch file"),
        (_missing_key, "missing head.bias"),
        (_wrong_shape, "head.bias has shape [3], needs [64]"),
        (_full, "where 1 MB are free"),
    ],
)
@pytest.mark.parametrize("command", [("serve", NAME, "--port", 0), ("convert", NAME)])
def test_what_goes_wrong_on_the_way_is_one_line_and_leaves_nothing_half_done(
    run: Run,
    hub: FakeHub,
    spec: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[pytest.MonkeyPatch, FakeHub, ModelSpec], None],
    says: str,
    command: tuple[object, ...],
) -> None:
    """And once it is put right, the same name works.

    The library says of every broken transfer that it tries again; that is its business.
    """
    with monkeypatch.context() as patch:
        harm(patch, hub, spec)
        code, said, error = run(*command)
    assert (code, said, error.count("\n")) == (1, "", 1), error
    assert error.startswith("dd-server: error:") and says in error
    assert [p.name for p in models_folder().glob("[!.]*")] == []
    if harm in (_truncated, _missing_key, _wrong_shape):
        shutil.rmtree(constants.HF_HUB_CACHE)  # on a hub a repaired file is another commit's
    assert run("convert", NAME)[0] == 0
    load_bundle(models.find(NAME).folder, torch.device("cpu"))


def test_a_model_of_texts_needs_its_encoders_library(
    run: Run, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before gigabytes are fetched for nothing, and of one that is here."""
    name = "llamagen-t2i-512"
    tiny = tiny_spec(name)
    monkeypatch.setitem(registry(), name, tiny)
    publish(hub, tiny, random_modules(tiny))
    monkeypatch.setattr("server.models.catalog.find_spec", lambda _: None)
    with pytest.raises(InvalidRequestError, match=r"distilled-decoding\[t5\]"):
        models.find(name)
    assert not hub.asked
    assert run("convert", name)[0] == 0
    with pytest.raises(InvalidRequestError, match=r"distilled-decoding\[t5\]"):
        models.find(name)
    assert "text" in run("models", name)[1]
    monkeypatch.setattr("server.models.catalog.find_spec", lambda _: object())
    found = models.find(name)
    assert found.condition(None, "a cat") == "a cat"
    assert isinstance(found.manifest.text, T5Config) and found.manifest.text.repo == "google/flan-t5-xl"


def test_models_lists_what_is_here_and_what_can_be_had(run: Run, hub: FakeHub, spec: ModelSpec) -> None:
    code, said, _ = run("models")
    here, _, there = said.partition("fetched when first used")
    assert code == 0
    assert "cifar10: " in here and NAME not in here and NAME in there
    assert run("convert", NAME)[0] == 0
    here, _, there = run("models")[1].partition("fetched when first used")
    assert f"{NAME}: " in here and f"  {NAME} " not in there
    assert not hub.asked["GET FoundationVision/var/var_d20.pth"]
    said = run("models", "llamagen-dd-l")[1]
    assert "pre-trained-61-81" in said and "22 forward passes   FID 6.76 (published)" in said


def _publish_t5(hub: FakeHub, folder: Path, dim: int) -> None:
    """A tiny T5 under the name of the large one."""
    transformers = pytest.importorskip("transformers", reason="the extra t5 is not installed")
    torch.manual_seed(0)
    sizes = {"d_model": dim, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 16}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))
    model.save_pretrained(folder)
    pieces = Tokenizer.from_buffer(pieces_file())
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]").save_pretrained(folder)
    for path in folder.iterdir():
        hub.add("google/flan-t5-xl", path.name, path.read_bytes())


def test_a_model_of_texts_goes_from_the_hub_to_a_picture(
    run: Run, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`llamagen-t2i-256` with its encoder: pulled, converted, asked; another prompt is another picture."""
    name = "llamagen-t2i-256"
    tiny = tiny_spec(name)
    monkeypatch.setitem(registry(), name, tiny)
    publish(hub, tiny, random_modules(tiny))
    assert isinstance(tiny.teacher, LlamaGenConfig)
    _publish_t5(hub, tmp_path / "t5", tiny.teacher.text_dim)
    shown = []
    for number, prompt in enumerate(["a red cat", "blue hearts", "a red cat"]):
        out = tmp_path / f"{number}.png"
        arguments = ("--model", name, "--prompt", prompt, "--steps", 16, "--device", "cpu", "--out", out)
        code, said, error = run("generate", *arguments)
        assert code == 0, error
        assert prompt in said and "teacher" in said
        shown.append(out.read_bytes())
    assert shown[0] == shown[2] != shown[1]
    assert hub.asked["HEAD google/flan-t5-xl/model.safetensors"] >= 1
