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
from training.stages.tokenizer import new_tokenizer, tokenizer_stage
from training.stages.tokens import encode_all

CPU = torch.device("cpu")
STAGES = {
    "tiny": ("tokenizer", "decoder", "teacher", "student"),
    "var-tiny": ("tokenizer", "teacher", "student"),
}
STEPS = 3


def recipe_of(family: str, accumulate: int) -> Recipe:
    """The tiny recipe in batches of four, of which two rows are decoded, so some parts have none.

    LlamaGen's student has all losses. Its tokenizer does not quantise yet, VAR's does from the first update
    on: the nearest of codes that were just put on vectors of the batch can be a matter of the last bit.
    """
    tiny, few = get_recipe(family), {"steps": STEPS, "batch": 4}
    weight = float(family == "tiny")
    return replace(
        tiny,
        accumulate=accumulate,
        recompute=accumulate > 1,
        # A judge of this stage amplifies rounding: at full weight the ranks were 6e-5 apart.
        tokenizer=replace(
            tiny.tokenizer, continuous_for=weight, adversarial=0.01 * weight, judged_from=0.0, **few
        ),
        decoder=replace(tiny.decoder, **few),
        teacher=replace(tiny.teacher, replaced=0.5, **few),
        distill=replace(tiny.distill, lpips=weight, adversarial=weight, judged_share=0.5, **few),
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
    pairs = [
        Pairs(images.labels, part, seed, begin)
        for part, seed, begin in zip(tokens, (5, 8), (0, 2), strict=True)
    ]
    return distill_stage(recipe, pairs[0], teacher, tokenizer, lpips, CPU, own=pairs[1])[0]


@contextmanager
def comparable() -> Iterator[None]:
    """Arithmetic in which two orders of one sum stay as close as they are.

    bfloat16 does not have the digits; and AdamW divides by the size of a gradient, so one that is but
    rounding (that of a bias before a norm) moves its parameter as far as any other. With a larger epsilon it
    stays where it is, and updates are as far off as gradients are.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (runtime, muon):
            patch.setattr(module, "native_bfloat16", lambda _: False)
        patch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))
        patch.setattr(plots, "loss_curve", lambda *_: None)  # it takes longer than the updates
        yield


def train(folder: Path, accumulate: int, stops: tuple[int | None, ...] = (None,), only: str = "") -> None:
    """Leaves checkpoint and journal of every stage (or of one) of both families, and tokens, in `folder`."""
    lpips = Lpips(folder.parent / "lpips.safetensors")
    for family, names in STAGES.items():
        recipe = recipe_of(family, accumulate)
        for name in (only,) if only else names:
            for stop in stops:
                stage = replace(make(name, recipe, lpips), preview=None)
                run_stage(stage, folder / family, seed=0, log_every=1, save_every=2, stop_after=stop)
        images = ImageSet(pictures_like(7), torch.arange(7))
        tokens = encode_all(new_tokenizer(recipe, CPU).eval(), images, CPU, batch=2)
        if parallel.is_main():
            torch.save(tokens, folder / family / "tokens.pt")


def main(folder: Path) -> None:
    """All stages, a batch in four parts; and one stage that is stopped and resumed."""
    torch.set_num_threads(1)
    with comparable(), parallel.joined(CPU):
        train(folder / "ranks", 2)
        train(folder / "resumed", 2, (2, None), "teacher")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
