"""The recipe of a command: a named one with what the command line changes, or the one that its run has."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dd_core.errors import RecipeError
from training.data.sources import same_folder, with_folder
from training.mismatch import differences
from training.recipes.named import DEFAULT, RECIPES, changed, checked, get_recipe
from training.recipes.saved import check_changes, has_begun, read_recipe
from training.recipes.settings import Recipe

log = logging.getLogger("dd_train")

_SHOWN = 8  # settings that one line of the log lists
_ARCHITECTURE = ("model.", "tokenizer_model.")


def choose_recipe(
    out: Path,
    name: str | None,
    overrides: Sequence[str] = (),
    data: Path | None = None,
    size: int | None = None,
) -> Recipe:
    """The recipe of a command on the run folder `out`.

    Args:
        name: a named recipe; None = the run's, or `DEFAULT` where it has none yet.
        overrides: changes of single fields. Those of the architecture come before `data`, which fits it to
            its classes and its size, the others after.
        data: a folder of images.
        size: side of the images of `data` in pixels; None = the run's, or the recipe's own.

    Raises:
        DataError: the folder's images cannot be used.
        RecipeError: no such recipe, a value that a field does not take, or a run that was begun with another
            recipe, other images, or other settings of a stage that has begun.
    """
    saved = read_recipe(out)
    if saved is not None and has_begun(out):
        return _continued(out, saved, name, overrides, data, size)
    recipe = saved if saved is not None and name is None else get_recipe(name or DEFAULT)
    changed(recipe, overrides)  # which refuses before the images are decoded
    first = [item for item in overrides if item.startswith(_ARCHITECTURE)]
    recipe = changed(recipe, first)
    if data is not None:
        recipe = with_folder(recipe, data, size)
    elif size is not None and size != recipe.image_size:
        raise RecipeError("--size goes with --data, the folder of the images", param="size")
    return checked(changed(recipe, [item for item in overrides if item not in first]))


def _continued(
    out: Path, saved: Recipe, name: str | None, overrides: Sequence[str], data: Path | None, size: int | None
) -> Recipe:
    """The recipe of a run that has begun: what was chosen then stays."""
    if name not in (None, saved.name):
        raise RecipeError(
            f"{out} was begun with the recipe {saved.name!r}, not {name!r}; choose another --out",
            param="recipe",
        )
    if size not in (None, saved.image_size):
        raise RecipeError(
            f"{out} was begun with images of {saved.image_size} pixels, not {size}; choose another --out",
            param="size",
        )
    recipe = saved
    if data is not None:
        if saved.folder is None:
            raise RecipeError(
                f"{out} was begun with data={saved.data}, not with a folder; choose another --out",
                param="data",
            )
        same_folder(saved.folder, data, saved.image_size)  # which may have moved
        recipe = replace(saved, folder=replace(saved.folder, path=str(data.resolve())))
    recipe = checked(changed(recipe, overrides))
    check_changes(out, saved, recipe)
    if name is not None:
        _tell_own_settings(out, recipe)
    return recipe


def _tell_own_settings(out: Path, recipe: Recipe) -> None:
    """Log where a run is not as its recipe's name says: it keeps its changes, and the recipe of its day."""
    named = RECIPES.get(recipe.name, recipe)  # which an older version may have had
    if found := list(differences(asdict(named), asdict(recipe))):
        listed = ", ".join(f"{field} {own} (there {there})" for field, there, own in found[:_SHOWN])
        more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        log.info("%s keeps settings that are not the recipe %s's: %s%s", out, recipe.name, listed, more)
