"""A recipe for your own images: classes, size, and what hangs on how many blocks there are."""

from __future__ import annotations

from dataclasses import replace

from dd_core.bounds import MAX_SIDE
from dd_core.errors import RecipeError
from training.recipes.settings import Folder, Recipe

SMALLEST = 16  # LPIPS halves an image four times


def check_size(recipe: Recipe, size: int) -> None:
    """Do nothing if the recipe's tokenizer takes images of `size` × `size` pixels.

    Raises:
        RecipeError: it does not, or the recipe is not of classes.
    """
    if recipe.text is not None:
        raise RecipeError(
            f"the recipe {recipe.name!r} learns from texts; --data takes one of classes", param="recipe"
        )
    factor = recipe.tokenizer_model.downsampling
    if size < max(SMALLEST, factor):
        raise RecipeError(f"--size must be at least {max(SMALLEST, factor)}, not {size}", param="size")
    if size // factor > MAX_SIDE:
        raise RecipeError(
            f"--size must be at most {MAX_SIDE * factor}, {MAX_SIDE} codes a side, not {size}", param="size"
        )
    if size % factor:
        below = size // factor * factor
        raise RecipeError(
            f"--size must be a multiple of {factor}, by which the tokenizer shrinks an image: "
            f"{below} or {below + factor}, not {size}",
            param="size",
        )


def for_images(recipe: Recipe, folder: Folder, size: int, train: int, test: int) -> Recipe:
    """The recipe with a folder's classes and grid, at `size` × `size` pixels.

    Training steps and the heads' split stay at the same share of the way through the blocks (20 of 64 becomes
    80 of 256, as in the paper). An evaluation uses no more images than there are: `train` to hold against,
    and `test`.

    Raises:
        RecipeError: as `check_size`.
    """
    check_size(recipe, size)
    side = size // recipe.tokenizer_model.downsampling
    model = replace(recipe.model.with_side(side), num_classes=len(folder.classes))
    before, now = recipe.model.layout.num_blocks, model.layout.num_blocks
    old = recipe.distill
    steps = (min(now - 1, max(1, round(t * now / before))) if t else 0 for t in old.train_steps)
    split = None if old.split is None else round(old.split * now / before)
    evaluate = replace(
        recipe.evaluate,
        reference=min(train, recipe.evaluate.reference),
        test=min(test, recipe.evaluate.test),
    )
    return replace(
        recipe,
        tokenizer_model=recipe.tokenizer_model.with_side(side),
        model=model,
        distill=replace(old, train_steps=tuple(dict.fromkeys(steps)), split=split),
        evaluate=evaluate,
        train_images=0,
        data="folder",
        folder=folder,
    )
