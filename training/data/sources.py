"""Where a run's images come from: one way to them, whatever the recipe's `data` is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from dd_core.errors import RecipeError
from training.data import text
from training.data.cifar10 import CIFAR10_CLASSES, cifar10
from training.data.folders import FolderImages, load_folder
from training.data.images import About, ImageSet
from training.losses.lpips import Lpips, lpips_weights
from training.metrics.caption_retrieval import Prompted
from training.presets import renamed
from training.recipes.own_images import check_size, for_images
from training.recipes.settings import Folder, Recipe
from training.run import Run


def load_images(run: Run) -> tuple[ImageSet, ImageSet]:
    """All images to learn from, and others of the same kind that are held out.

    Of pictograms: every view of every picture that is not held out, labelled with the picture's number.

    Raises:
        DataError: they cannot be had.
        RecipeError: the recipe has none, or the folder has changed since the run was begun.
    """
    recipe = run.recipe
    match recipe.data:
        case "cifar10":
            return cifar10("train"), cifar10("test")
        case "pictograms":
            return text.train_images(recipe), text.images_of(text.pictures("pair"), recipe.image_size, 1)
        case "folder":
            assert recipe.folder is not None, "a rule of the recipe"
            found = same_folder(recipe.folder, Path(recipe.folder.path), recipe.image_size)
            return found.train, found.test
        case "none":
            raise RecipeError(
                f"the recipe {recipe.name!r} has no images: begin with `dd-train start`, from a bundle that "
                "has a tokenizer and a teacher",
                param="recipe",
            )


def material(run: Run) -> tuple[ImageSet, ImageSet, Prompted | None]:
    """Real images, others to hold against them, and the prompts of a model of texts: for an evaluation.

    Raises:
        DataError, RecipeError: as `load_images`.
    """
    if run.recipe.text is not None:
        return text.held_out(run.recipe, run.out, Lpips(lpips_weights()))
    reference, test = load_images(run)
    return reference, test.first(run.recipe.evaluate.test), None


def with_folder(recipe: Recipe, path: Path, size: int | None = None) -> Recipe:
    """A recipe for the images of a folder, at `size` × `size` pixels, by default the recipe's own size.

    Raises:
        DataError: the folder's images cannot be used.
        RecipeError: the recipe's tokenizer does not take the size, or the recipe is not of classes.
    """
    size = size or recipe.image_size
    check_size(recipe, size)
    found = load_folder(path, size)
    train, test = len(found.train.labels), len(found.test.labels)
    folder = Folder(str(path.resolve()), found.classes, train + test, found.digest)
    made = for_images(recipe, folder, size, train, test)
    return replace(made, evaluate=replace(made.evaluate, plans=renamed(recipe, made)))


def same_folder(known: Folder, path: Path, size: int) -> FolderImages:
    """The images of a folder that has to hold what it held when the run was begun.

    Raises:
        DataError: the folder's images cannot be used.
        RecipeError: they are others.
    """
    found = load_folder(path, size)
    if found.digest != known.digest:
        count = len(found.train.labels) + len(found.test.labels)
        raise RecipeError(
            f"{path} has changed since this run was begun: {known.images} images of {len(known.classes)} "
            f"classes then, {count} of {len(found.classes)} now; put it back or choose another --out",
            param="data",
        )
    return found


def class_names(recipe: Recipe) -> tuple[str, ...]:
    """Names of the recipe's classes, in the order of the labels; none where texts are the condition."""
    if recipe.folder is not None:
        return recipe.folder.classes
    return CIFAR10_CLASSES if recipe.data == "cifar10" else ()


def about(recipe: Recipe) -> About:
    """The data as a bundle describes it."""
    if recipe.text is not None:
        return text.about(recipe)
    if recipe.folder is not None:
        size, folder = recipe.image_size, recipe.folder
        return About(
            f"{len(folder.classes)} classes of {_name(folder)} at {size}×{size}, trained with the recipe "
            f"{recipe.name!r}.",
            folder.classes,
            f"{folder.images:,} images of a folder, {_name(folder)}. The bundle holds weights, none of the "
            "images.",
            licence="not stated: it is for whoever trained the weights to choose",
        )
    if recipe.data == "none":
        count = recipe.model.num_classes
        return About(
            f"{count} classes, distilled with the recipe {recipe.name!r}. A class is named by its number.",
            tuple(str(number) for number in range(count)),
            "Not stated: it is for whoever trained the teacher to say. No images were needed here.",
            licence="that of the teacher's weights",
        )
    return About(
        "Small photographs of ten kinds of things, the classes of CIFAR-10. Horses, ships, cars and "
        "trucks come out best.",
        CIFAR10_CLASSES,
        "CIFAR-10 (Krizhevsky, 2009), 50,000 training images; no licence stated, used for research. "
        "The bundle holds weights, none of the images.",
        ("horse",),
    )


def bundle_name(recipe: Recipe) -> str:
    """A name for the bundle where none is given: that of the data, as requests may have it."""
    if recipe.folder is None:
        return recipe.data
    return re.sub(r"[^a-z0-9]+", "-", _name(recipe.folder).lower()).strip("-")[:64].strip("-") or "images"


def _name(folder: Folder) -> str:
    return Path(folder.path).name
