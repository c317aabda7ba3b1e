"""Every stage for a few updates, by one process or by those that torchrun starts.

    torchrun --nproc_per_node 2 -m tests.training.ranks FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dd_core import runtime
from tests.training.helpers import pictures_like
from training import parallel
from training.data.images import ImageSet
from training.losses.lpips import Lpips
from training.metrics import plots
from training.optim import muon
from training.optim.loop import Stage, run_stage
from training.recipes.named import get_recipe
from training.recipes.settings import Recipe
from training.stages.decoder import decoder_stage
from training.stages.distill import distill_stage
from training.stages.pairs import Pairs
from training.stages.teacher import new_teacher, teacher_stage
from training.stages.tokenizer import encode_all, new_tokenizer, tokenizer_stage

CPU = torch.device("cpu")
STAGES = ("tokenizer", "decoder", "teacher", "student")
FAMILIES = ("tiny", "var-tiny")
STEPS = 3


def recipe_of(family: str, accumulate: int = 1) -> Recipe:
    """The tiny recipe, with all losses, and a tokenizer that begins to quantise after two updates."""
    tiny = get_recipe(family)
    return replace(
        tiny,
        accumulate=accumulate,
        recompute=accumulate > 1,
        tokenizer=replace(tiny.tokenizer, steps=STEPS, continuous_for=0.5),
        decoder=replace(tiny.decoder, steps=STEPS),
        teacher=replace(tiny.teacher, steps=STEPS),
        distill=replace(tiny.distill, steps=STEPS, adversarial=1.0, judged_share=0.25),
    )


def make(name: str, recipe: Recipe, lpips: Lpips) -> Stage:
    """A stage on material that is the same for every process."""
    images, tokenizer = ImageSet(pictures_like(24), torch.arange(24) % 10), new_tokenizer(recipe, CPU)
    generator = torch.Generator().manual_seed(2)
    length = recipe.model.layout.num_tokens
    tokens = torch.randint(64, (2, 24, length), generator=generator)
    if name == "tokenizer":
        return tokenizer_stage(recipe, images, lpips, CPU)[0]
    if name == "decoder":
        return decoder_stage(recipe, images, tokens, tokenizer, lpips, CPU)[0]
    teacher = new_teacher(recipe, tokenizer, CPU)
    if name == "teacher":
        return teacher_stage(recipe, tokens, images.labels, tokenizer, CPU)[0]
    pairs = [Pairs(images.labels, part, seed, begin) for part, seed, begin in zip(tokens, (5, 8), (0, 2), strict=True)]
    return distill_stage(recipe, pairs[0], teacher, tokenizer, lpips, CPU, own=pairs[1])[0]


@contextmanager
def comparable() -> Iterator[None]:
    """Arithmetic in which two orders of one sum stay as close as they are.

    bfloat16 does not have the digits; and AdamW divides by the size of a gradient, so one that is but rounding (that of
    a bias before a norm) moves its parameter as far as any other: a larger epsilon leaves it where it is.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (runtime, muon):
            patch.setattr(module, "native_bfloat16", lambda _: False)
        patch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-3))
        patch.setattr(plots, "loss_curve", lambda *_: None)  # it takes longer than the updates
        yield


def train(folder: Path, lpips: Lpips, accumulate: int = 1, stops: tuple[int | None, ...] = (None,)) -> None:
    """Leaves the checkpoint and the journal of every stage of both families in `folder`."""
    for family in FAMILIES:
        recipe = recipe_of(family, accumulate)
        for name in STAGES:
            for stop in stops:
                stage = replace(make(name, recipe, lpips), preview=None)
                run_stage(stage, folder / family, seed=0, log_every=1, save_every=2, stop_after=stop)
        images = ImageSet(pictures_like(7), torch.arange(7))
        tokens = encode_all(new_tokenizer(recipe, CPU).eval(), images, CPU, batch=2)
        if parallel.is_main():
            torch.save(tokens, folder / family / "tokens.pt")


def main(folder: Path) -> None:
    """Two ranks: a straight run, and one that was stopped and resumed."""
    torch.set_num_threads(1)
    lpips = Lpips(folder / "lpips.safetensors")
    with comparable(), parallel.joined(CPU):
        train(folder / "ranks", lpips)
        train(folder / "resumed", lpips, stops=(2, None))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
