"""The corpus of pictures and captions: what it holds, how it is split, what a picture is called."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.training import fakes
from training.data import captions, packages, pictograms
from training.data import text as text_data
from training.data.conditions import TextConditions
from training.data.packages import DataError
from training.recipes.named import get_recipe
from training.run import Run
from training.stages import pairs


@pytest.fixture(scope="module")
def run(corpus: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has not begun."""
    return Run(get_recipe("text-tiny"), tmp_path_factory.mktemp("run"), torch.device("cpu"))


def test_a_corpus_of_another_version_is_refused(
    corpus: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictograms, "_VERSION", 1)
    with pytest.raises(DataError, match=r"of another version: run `dd-train corpus`"):
        pictograms.load()


def test_the_corpus_has_every_style_and_no_skin_tones_or_countries(corpus: pytest.MonkeyPatch) -> None:
    corpus = pictograms.load()
    assert corpus.images_FN3HW.shape == (6, len(corpus), 3, 64, 64)
    assert {s: corpus.styles.count(s) for s in set(corpus.styles)} == {
        "noto": 40, "3d": 30, "flat": 40, "blob": 26,
    }  # fmt: skip
    names = {c.name for c in corpus.concepts}
    assert len(names) == 40 and not any("Chad" in n or "skin" in n for n in names)
    record = json.loads((packages.cache_dir() / "pictograms.json").read_text())
    assert all(e["licence"] == "MIT" and len(e["sha256"]) == 64 for e in record["licences"])
    assert sum(e.get("pictures", 0) for e in record["licences"]) == len(corpus)
    drawn = [c.name for c, style in zip(corpus.concepts, corpus.styles, strict=True) if style == "blob"]
    assert fakes.name_of(38) in drawn and fakes.name_of(39) not in drawn, "of two alike the first"


@pytest.mark.parametrize(
    ("label", "group", "mirrored"),
    [
        ("cat", 3, True),
        ("left arrow", 8, False),
        ("leftwards hand", 1, False),
        ("chart increasing", 7, False),
        ("map of Japan", 5, False),
        ("Aries", 8, False),
        ("black flag", 9, True),
    ],
)
def test_what_means_something_else_in_a_mirror_is_not_mirrored(
    label: str, group: int, mirrored: bool
) -> None:
    names = json.dumps([{"label": label, "hexcode": "1F600", "group": group}]).encode()
    assert [c.mirrored for c in pictograms.concepts(names)] == [mirrored]


def test_pictures_are_on_white_and_arrows_are_not_mirrored(corpus: pytest.MonkeyPatch) -> None:
    corpus = pictograms.load()
    for i, (concept, style) in enumerate(zip(corpus.concepts, corpus.styles, strict=True)):
        plain, mirrored = corpus.images_FN3HW[:2, i]
        assert plain[:, 0, 63].tolist() == [255, 255, 255]
        same = torch.equal(plain, mirrored)
        if "arrow" in concept.name:
            assert same
        elif style == "noto":
            assert torch.equal(plain.flip(2), mirrored) and not same


def test_a_package_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DD_CACHE", str(tmp_path))
    package = fakes.archive(tmp_path, "npm", "names", {"en/data.json": b"[]"})
    assert packages.one_file(package, "en/data.json") == b"[]"
    with pytest.raises(DataError, match=r"no file en/other\.json"):
        packages.one_file(package, "en/other.json")
    with (tmp_path / package.file).open("ab") as file:
        file.write(b"!")
    with pytest.raises(DataError, match="SHA-256"):
        packages.one_file(package, "en/data.json")


def test_held_out_pairs_and_concepts_are_never_learned_from(corpus: pytest.MonkeyPatch, run: Run) -> None:
    corpus = pictograms.load()
    found = captions.splits(corpus)
    assert found == captions.splits(corpus) and set(found) == {"train", "pair", "concept"}
    by = {s: [i for i, k in enumerate(found) if k == s] for s in set(found)}
    learned = {corpus.concepts[i].code for i in by["train"]}
    assert learned.isdisjoint(corpus.concepts[i].code for i in by["concept"])
    assert learned.issuperset(corpus.concepts[i].code for i in by["pair"])
    fluent: dict[str, set[str]] = {}
    for concept, style, split in zip(corpus.concepts, corpus.styles, found, strict=True):
        if style in ("3d", "flat"):
            fluent.setdefault(concept.code, set()).add(split)
    assert all(len(splits) == 1 for splits in fluent.values()), "one drawing in two finishes"
    assert {"pair"} in fluent.values()
    prompts = set(pairs.pair_prompts(run))
    for i in by["pair"] + by["concept"]:
        style = corpus.styles[i]
        styled = {c for c in text_data.captions_of([i]).texts if style in c}
        assert len(styled) == 4 and prompts.isdisjoint(styled)
    images = text_data.train_images(run.recipe)
    assert len(images.images) == 6 * len(by["train"])
    half = F.avg_pool2d(corpus.images_FN3HW[0, by["train"][3]].float(), 2)
    assert (images.images[3] - half).abs().max() <= 0.5
    assert images.images[3].shape == (3, 32, 32) == (3, run.recipe.image_size, run.recipe.image_size)
    whole = text_data.images_of(by["pair"], 64, 1)
    assert torch.equal(whole.images, corpus.images_FN3HW[0, by["pair"]])


def test_the_first_drawing_is_learned_from_where_all_would_be_held_out() -> None:
    """In all its finishes: 3d and glossy are one drawing."""
    codes = [f"{i:x}" for i in range(400)]
    held = next(c for c in codes if {captions.split_of(c, s) for s in ("3d", "blob")} == {"pair"})
    concept, styles = pictograms.Concept(held, "cat", (), 0, True), ("3d", "glossy", "blob")
    corpus = pictograms.Corpus(torch.empty(0), (concept,) * 3, styles)
    assert captions.splits(corpus) == ("train", "train", "pair")


def test_pairs_ask_for_a_caption_as_often_as_the_teacher_learned_from_it(run: Run) -> None:
    known = text_data.captions_of(text_data.pictures("train", run.recipe.train_images))
    learned = Counter(known.texts[place] for row in known.of_picture for place in row)
    prompts = text_data.train_prompts(run.recipe)
    assert Counter(prompts) == learned and max(learned.values()) > 2
    assert prompts == text_data.train_prompts(run.recipe) != sorted(prompts)
    conditions = text_data.prompt_conditions(run.recipe, prompts, run.out / "all-prompts.safetensors")
    assert isinstance(conditions, TextConditions)
    assert conditions.count == len(prompts) and len(conditions.states_MTD) == len(learned)
    twice = [i for i, prompt in enumerate(prompts) if prompt == learned.most_common(1)[0][0]]
    assert len(set(conditions.pick(torch.tensor(twice)).tolist())) == 1


def test_captions_are_drawn_from_names_keywords_and_styles() -> None:
    concept = pictograms.Concept("1f600", "Red Heart", ("love", "pet"), 0, True)
    found = captions.captions_of(concept, "3d")
    assert found == captions.captions_of(concept, "3d") and len(found) == captions.PER_PICTURE
    assert found[captions.FULL] == "red heart, 3d style" and "red heart" in found
    assert all("red heart" in c for c in found), "a keyword alone may mean anything"
    assert captions.captions_of(concept, "3d", "pink") == found, "its name says the colour"
    bare = captions.captions_of(pictograms.Concept("1f600", "star", ("on", "t5"), 0, True), "flat", "blue")
    assert bare[:4] == ("star", "star, flat style", "flat star", "blue star")
    assert bare[4:] == ("blue star in flat style", "a blue star", "star", "flat style star")


@pytest.mark.parametrize(
    ("name", "spoken", "shown"),
    [
        ("woman: bald", "bald woman", "a bald woman"),
        ("man: red hair", "man with red hair", "a man with red hair"),
        ("person: beard", "person with beard", "a person with beard"),
        ("kiss: woman, man", "kiss, woman, man", "a kiss, woman, man"),
        ("Ox", "ox", "an ox"),
        ("glasses", "glasses", "glasses"),
        ("women with bunny ears", "women with bunny ears", "women with bunny ears"),
        ("dress", "dress", "a dress"),
    ],
)
def test_a_concept_is_called_as_people_say_it(name: str, spoken: str, shown: str) -> None:
    concept = pictograms.Concept("1f600", name, (), 0, True)
    assert captions.called(concept) == spoken
    assert shown in captions.captions_of(concept, "3d")


def test_a_main_colour_stands_before_the_name(corpus: pytest.MonkeyPatch) -> None:
    """The one concept whose name has no colour, drawn in green; "people" stay several in yellow."""
    known = pictograms.load()
    plain = [i for i, concept in enumerate(known.concepts) if concept.name == "cat 6"]
    assert plain and all("a green cat 6" in text_data.captions_of([i]).texts for i in plain)
    people = pictograms.Concept("1f600", "people hugging", (), 0, True)
    assert captions.captions_of(people, "3d", "yellow")[5] == "yellow people hugging"
    assert captions.captions_of(pictograms.Concept("1f600", "bus", (), 0, True), "3d")[5] == "a bus"
    assert captions.captions_of(pictograms.Concept("1f600", "unicorn", (), 0, True), "3d")[5] == "a unicorn"
