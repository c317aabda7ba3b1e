"""Recipes by name, and overrides of single fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dd_core.bounds import MAX_TOKENS
from dd_core.errors import RecipeError
from dd_core.models.config import LlamaGenConfig, MultiScaleConfig
from training.recipes.llamagen import LLAMAGEN
from training.recipes.overrides import overridden
from training.recipes.published import PUBLISHED
from training.recipes.settings import Recipe
from training.recipes.var import VAR

RECIPES = {**LLAMAGEN, **VAR, **PUBLISHED}
DEFAULT = "gpu" if torch.cuda.is_available() else "cpu"


def get_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A named recipe with `stage.field=value` overrides.

    Raises:
        RecipeError: unknown recipe, stage or field; a value that the field does not take, or that
            contradicts another one.
    """
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}", param="recipe")
    return checked(changed(RECIPES[name], overrides))


def changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `stage.field=value` overrides, not yet `checked`.

    Raises:
        RecipeError: unknown stage or field, or a value that the field does not take.
    """
    for item in overrides:
        recipe = overridden(recipe, item)
    return recipe


def checked(recipe: Recipe) -> Recipe:
    """The recipe, if its fields agree with each other.

    Raises:
        RecipeError: one contradicts another.
    """
    for field_name, broken, rule in _rules(recipe):
        if broken:
            raise RecipeError(f"{field_name} must {rule}", param=field_name)
    return recipe


def _rules(recipe: Recipe) -> Iterator[tuple[str, object, str]]:
    """Yield what fields demand of each other: a field, true if it breaks the rule, and the rule."""
    vq, model, text, distill, evaluate = (
        recipe.tokenizer_model,
        recipe.model,
        recipe.text,
        recipe.distill,
        recipe.evaluate,
    )
    blocks, pictured = model.layout.num_blocks, recipe.data != "none"
    yield "model", model.family != vq.family, f"be of the tokenizer's family, {vq.family}"
    yield (
        "model.codebook_size",
        model.codebook_size != vq.codebook_size,
        f"be the tokenizer's, {vq.codebook_size}",
    )
    yield "model.code_dim", model.code_dim != vq.code_dim, f"be the tokenizer's, {vq.code_dim}"
    scales = vq.layout if isinstance(vq, MultiScaleConfig) else model.layout
    yield "model.sides", model.layout != scales, "be the tokenizer's"
    # Rotary embeddings turn pairs of dimensions, for a row and for a column.
    unit, times = (4, ", four times") if isinstance(model, LlamaGenConfig) else (1, "")
    yield "model.heads", model.dim % (unit * model.heads), f"divide model.dim, {model.dim}{times}"
    widths = [vq.channels * multiplier for multiplier in (1, *vq.channel_multipliers)]
    uneven = any(width % 32 for width in widths)
    yield (
        "tokenizer_model.channels",
        uneven,
        "be a multiple of 32, times each of channel_multipliers too",
    )
    tokens = model.layout.num_tokens
    yield "model", tokens > MAX_TOKENS, f"have at most {MAX_TOKENS} tokens an image, not {tokens}"
    size, folder = recipe.image_size, recipe.folder
    sizes = {"cifar10": (32,), "pictograms": (32, 64)}.get(recipe.data, (size,))
    wanted = " or ".join(map(str, sizes))
    yield "model", size not in sizes, f"make pictures of {wanted} pixels with the tokenizer, not of {size}"
    yield (
        "folder",
        (recipe.data == "folder") != (folder is not None),
        "come with --data DIR, for data=folder",
    )
    count = 10 if folder is None else len(folder.classes)
    classes = recipe.data in ("cifar10", "folder")
    yield (
        "model.num_classes",
        classes and model.num_classes != count,
        f"be {count}, as the images have",
    )
    fits = {"pictograms": text is not None, "none": True}.get(recipe.data, text is None)
    yield "data", not fits, "be cifar10 or folder without text, pictograms with it, or none"
    if text is not None:
        yield "model.text_tokens", model.text_tokens != text.length, f"be text.length, {text.length}"
        yield "model.text_dim", model.text_dim != text.dim, f"be text.dim, {text.dim}"
    steps = distill.train_steps
    within = all(t < blocks for t in steps) and len(set(steps)) == len(steps)
    yield "distill.train_steps", not within, f"be different steps of 0..{blocks - 1}"
    yield "distill.split", (distill.split or 0) > blocks, f"be at most {blocks}, the number of blocks"
    yield (
        "distill.layers",
        (distill.layers or model.num_layers) < model.num_layers,
        f"be at least the model's {model.num_layers}",
    )
    too_many = distill.pairs > recipe.pairs.count
    yield "distill.pairs", too_many, f"be at most pairs.count, {recipe.pairs.count}"
    watched = recipe.evaluate_every > 0
    yield "evaluate_every", watched and not pictured, "be 0: the recipe has no images to measure against"
    alone = not evaluate.plans or any(name.startswith("dd-") for name in evaluate.plans)
    yield "evaluate.plans", watched and not alone, "have a plan of the student's, as dd-1, for evaluate_every"
    lost = distill.start == "transplant" and recipe.begin_from is None
    yield "begin_from", lost, "name a bundle for distill.start=transplant"
    yield "evaluate.images", pictured and evaluate.images < 2, "be at least 2"
    yield "evaluate.reference", pictured and evaluate.reference < 2, "be at least 2"
