"""The text corpus: emoji drawn in eight styles under permissive licences, with names and keywords.

    packages ─▶ PNG, WebP or SVG ─▶ 128 px on white ─▶ views of 64 px ─▶ pictograms.safetensors
    emojibase ─▶ name, keywords ──────────────────────────────────────▶ pictograms.json

A *concept* is an emoji (a code point sequence), a *picture* a concept in a style. Skin tones and
flags of countries are left out: they would be most of the corpus and teach colours of skin and
heraldry. A picture is stored as several *views*: as it is, mirrored, and a little smaller or
moved, so that 10,000 pictures are more than 10,000 lessons. A concept whose picture means
something else in a mirror (arrows, letters, clocks) has no mirrored views. Where a style draws two
concepts alike, pixel by pixel, the first has the picture.

Shapes: F views, N pictures; images are `[F, N, 3, 64, 64]` uint8.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dd_core.files import replacing, save_tensors
from training.data.packages import DataError, Package, cache_dir, contents, one_file

log = logging.getLogger("dd_train")

SIDE = 64
_DRAWN, _BASE, _MARGIN = 256, 128, 16
_VERSION = 3  # raise it when the pictures change, so that no old file is taken
# Share of the side that a view shows, where its middle is (in base pixels), whether it is mirrored.
_VIEWS = ((1.0, 0.0, 0.0, False), (1.0, 0.0, 0.0, True), (1.08, 3.0, -2.0, False), (1.12, -3.0, 3.0, True),
          (1.04, -2.0, -3.0, False), (1.16, 2.0, 2.0, True))  # fmt: skip

NAMES = Package(
    "npm", "emojibase-data", "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT",
)  # fmt: skip
_NOTO = Package(
    "npm", "emoji-datasource-google", "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "Apache-2.0",
)  # fmt: skip
_FLUENT_3D = Package(
    "npm", "@lobehub/fluent-emoji-3d", "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT",
)  # fmt: skip
_FLUENT_FLAT = Package(
    "npm", "@lobehub/fluent-emoji-flat", "1.1.0",
    "8f9113c027c7c20eced0070354715a4093a459b8bef6332b91d45f38c9bdb147", "MIT",
)  # fmt: skip
_FLUENT_MODERN = Package(
    "npm", "@lobehub/fluent-emoji-modern", "1.0.0",
    "080906de394ad8335c24f67e1b33f12a9ac1b6d99324d26ae63cad8d27359769", "MIT",
)  # fmt: skip
_ICONIFY = Package(
    "npm", "@iconify/json", "2.2.535",
    "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91", "each set has its own",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One style: where its pictures lie and how they are called there.

    Args:
        style: the word for it in a caption.
        under: a folder of files named by code points, or a JSON icon set whose icons are named in words.
        licence: of the pictures, where it is not the package's.
    """

    style: str
    package: Package
    under: str
    licence: str | None = None


SOURCES = (
    Source("noto", _NOTO, "img/google/64/"),
    Source("3d", _FLUENT_3D, "assets/"),
    Source("flat", _FLUENT_FLAT, "assets/"),
    Source("glossy", _FLUENT_MODERN, "assets/"),
    Source("blob", _ICONIFY, "json/noto-v1.json", "Apache-2.0"),
    # The package says Apache-2.0, which FxEmojis has for its code; its designs are Mozilla's under CC BY.
    Source("firefox", _ICONIFY, "json/fxemoji.json", "CC-BY-4.0, designs by Mozilla"),
    Source("twitter", _ICONIFY, "json/twemoji.json", "CC-BY-4.0, designs by Twitter"),
    Source("emojione", _ICONIFY, "json/emojione.json", "CC-BY-4.0, designs by EmojiOne"),
)


@dataclass(frozen=True)
class Concept:
    """An emoji: its code points as in a file name, its English name and keywords, and its group."""

    code: str
    name: str
    keywords: tuple[str, ...]
    group: int
    mirrored: bool


@dataclass(frozen=True)
class Corpus:
    """The pictures: `images_FN3HW` uint8, and of each its concept and style."""

    images_FN3HW: Tensor
    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.concepts)


_COUNTRIES, _COMPONENTS, _SYMBOLS = 9, 2, 8
_ONE_WAY = re.compile(
    r"\b(left|right|leftwards|rightwards|arrow|clock|o’clock|thirty|button|letter|letters|input|sign|keycap|mark|"
    r"number|numbers|symbol|abc|latin|japanese|calendar|hundred|medal|question|east|west|moon|clockwise|dollar|yen|"
    r"euro|pound|increasing|decreasing|upwards|downwards|globe|map|japan|zzz|musical|closet|newspaper|ballot)\b"
)
_KEPT_FLAGS = frozenset(
    f"{kind} flag"
    for kind in ("chequered", "triangular", "black", "white", "rainbow", "transgender", "pirate")
) | {"crossed flags"}


def code_of(text: str) -> str:
    """Code points of a file name or of emojibase in one spelling: lower case, no presentation selector."""
    return "-".join(p for p in text.lower().split("-") if p != "fe0f")


def concepts(names: bytes) -> list[Concept]:
    """The concepts of emojibase's `data.json`, in its order."""
    found = []
    for entry in json.loads(names):
        group, label = entry.get("group"), entry["label"]
        if group is None or group == _COMPONENTS or (group == _COUNTRIES and label not in _KEPT_FLAGS):
            continue
        tags = tuple(t for t in entry.get("tags", []) if t.isascii() and t not in label.split())
        mirrored = group != _SYMBOLS and not _ONE_WAY.search(label.lower()) and not label.startswith("flag")
        found.append(Concept(code_of(entry["hexcode"]), label, tags, group, mirrored))
    return found


def build() -> Path:
    """Makes the corpus in the cache, or leaves it where it is there; returns its JSON file.

    Raises:
        DataError: a package cannot be had or is not the pinned one.
    """
    sources, names, wanted = SOURCES, NAMES, _made_of()
    store, facts = cache_dir() / "pictograms.safetensors", cache_dir() / "pictograms.json"
    if facts.exists() and json.loads(facts.read_text())["made_of"] == wanted and store.exists():
        return facts
    known = concepts(one_file(names, "en/data.json"))
    place = {c.code: i for i, c in enumerate(known)}
    spelled = {_letters(c.name): i for i, c in reversed(list(enumerate(known)))}
    pictures: dict[tuple[int, int], Tensor] = {}
    for number, source in enumerate(sources):
        found: dict[int, Tensor] = {}
        for name, drawn in _drawn(source, lambda n: n in place or _letters(n) in spelled):
            i = place.get(name, spelled.get(_letters(name), -1))
            found.setdefault(i, views(drawn, known[i].mirrored))
        unlike = {found[i][0].numpy().tobytes(): i for i in sorted(found, reverse=True)}
        pictures |= {(i, number): found[i] for i in unlike.values()}
        log.info("%s: %d pictures", source.style, len(unlike))
    order = sorted(pictures)
    made_of = [m | {"pictures": sum(1 for _, n in order if n == k)} for k, m in enumerate(wanted["sources"])]
    record = {
        "made_of": wanted,
        "licences": [_licence(m) for m in made_of] + [_licence(asdict(names) | {"style": "names, keywords"})],
        "concepts": [asdict(c) for c in known],
        "pictures": [[known[i].code, sources[n].style] for i, n in order],
    }
    save_tensors({"images": torch.stack([pictures[key] for key in order], 1).contiguous()}, store)
    with replacing(facts) as temporary:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return facts


def load() -> Corpus:
    """The corpus that `dd-train corpus` left in the cache.

    Raises:
        DataError: it is not there, or another version's is.
    """
    store, facts = cache_dir() / "pictograms.safetensors", cache_dir() / "pictograms.json"
    if not (store.exists() and facts.exists()):
        raise DataError(f"no pictograms in {cache_dir()}: run `dd-train corpus` first", param="data")
    record = json.loads(facts.read_text())
    if record["made_of"] != _made_of():
        raise DataError(
            f"the pictograms in {cache_dir()} are of another version: run `dd-train corpus`", param="data"
        )
    known = {c["code"]: Concept(**{**c, "keywords": tuple(c["keywords"])}) for c in record["concepts"]}
    pictures = record["pictures"]
    return Corpus(
        load_file(store)["images"], tuple(known[c] for c, _ in pictures), tuple(s for _, s in pictures)
    )


def digest() -> str:
    """Names the corpus that this version makes: its pictures and their order."""
    return hashlib.sha256(json.dumps(_made_of()).encode()).hexdigest()


def _made_of() -> dict[str, Any]:
    """All that the pictures depend on, as JSON holds it."""
    sources = [
        asdict(s.package) | {"style": s.style, "under": s.under, "licence": s.licence or s.package.licence}
        for s in SOURCES
    ]
    return {"version": _VERSION, "sources": sources, "names": asdict(NAMES)}


def licences() -> list[dict[str, Any]]:
    """Package, version, SHA-256, licence and number of pictures of everything in the corpus."""
    facts = cache_dir() / "pictograms.json"
    found: list[dict[str, Any]] = json.loads(facts.read_text())["licences"]
    return found


def views(drawn: Image.Image, mirrored: bool) -> Tensor:
    """`[F, 3, 64, 64]` uint8 of a picture with transparency, on white.

    A picture that must not be mirrored has its views unmirrored, so F is the same.
    """
    base = Image.new("RGBA", drawn.size, "white")
    base.alpha_composite(drawn.convert("RGBA"))
    small = base.convert("RGB").resize((_BASE, _BASE), Image.Resampling.BOX)
    sheet = Image.new("RGB", (_BASE + 2 * _MARGIN,) * 2, "white")
    sheet.paste(small, (_MARGIN, _MARGIN))
    middle, found = _MARGIN + _BASE / 2, []
    for scale, right, down, flip in _VIEWS:
        half = _BASE / 2 * scale
        box = (middle + right - half, middle + down - half, middle + right + half, middle + down + half)
        view = sheet.resize((SIDE, SIDE), Image.Resampling.HAMMING, box=box)
        if flip and mirrored:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found.append(np.asarray(view).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(found))


def at_size(images_FN3HW: Tensor, size: int) -> Tensor:
    """Views at 64 pixels or 32: means of squares of pixels, rounded; as they are at 64."""
    if size == SIDE:
        return images_FN3HW
    of = SIDE // size
    squares = (view.unflatten(3, (size, of)).unflatten(2, (size, of)) for view in images_FN3HW)
    # View by view: sums of all at once would be gigabytes.
    means = [
        (s.sum((3, 5), dtype=torch.int16) + of * of // 2).div_(of * of, rounding_mode="floor")
        for s in squares
    ]
    return torch.stack([mean.to(torch.uint8) for mean in means])


def _drawn(source: Source, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Image.Image]]:
    """Names and pictures of a style; a name is a code, or words for an icon set."""
    if source.under.endswith(".json"):
        icons = json.loads(one_file(source.package, source.under))
        width, height = icons.get("width", 16), icons.get("height", 16)
        for name, icon in icons["icons"].items():
            if wanted(name):
                box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
                head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
                yield name, _render(f'{head} viewBox="{box}">{icon["body"]}</svg>')
        return
    for path, data in contents(source.package, source.under):
        # Some files of one package lack the dot before their suffix.
        stem, _, suffix = re.sub(r"\.?(png|webp|svg)$", r".\1", Path(path).name).rpartition(".")
        if suffix and wanted(code_of(stem)):
            picture = _render(data.decode()) if suffix == "svg" else Image.open(io.BytesIO(data))
            yield code_of(stem), picture.convert("RGBA")


def _render(svg: str) -> Image.Image:
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=_DRAWN, height=_DRAWN, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _licence(source: dict[str, Any]) -> dict[str, Any]:
    kept = ("style", "name", "version", "under", "sha256", "licence", "pictures")
    return {k: source[k] for k in kept if k in source}
