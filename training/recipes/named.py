"""Recipes by name, and overrides of single fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from dd_core.errors import RecipeError
from training.recipes.llamagen import LLAMAGEN
from training.recipes.settings import Recipe
from training.recipes.var import VAR

RECIPES = {**LLAMAGEN, **VAR}


def get_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """A named recipe with `stage.field=value` overrides.

    Raises:
        RecipeError: unknown recipe, stage or field, or a value of the wrong type.
    """
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}", param="recipe")
    return overridden(RECIPES[name], overrides or [])


def overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with `stage.field=value` overrides; of a whole number, `stage.field=+value` adds to it.

    Raises:
        RecipeError: unknown stage or field, or a value of the wrong type.
    """
    for item in overrides:
        path, equals, text = item.partition("=")
        *stage, leaf = path.split(".")
        if not equals or len(stage) > 1:
            raise RecipeError(f"--set takes stage.field=value, not {item!r}", param="set")
        owner: Any = getattr(recipe, stage[0], None) if stage else recipe
        names = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        if leaf not in names:
            where = stage[0] if stage else "the recipe"
            raise RecipeError(
                f"{where} has no field {leaf!r}; it has {', '.join(names) or 'none'}", param="set"
            )
        changed = dataclasses.replace(owner, **{leaf: _parse(text, getattr(owner, leaf), path)})
        recipe = dataclasses.replace(recipe, **{stage[0]: changed}) if stage else changed
    return recipe


def _parse(text: str, old: Any, path: str) -> Any:
    if isinstance(old, str):
        return text
    if text.startswith("+") and text[1:].isdecimal() and type(old) is int:
        return old + int(text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if old is None:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise RecipeError(f"{path} takes a whole number, not {text!r}", param="set")
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(old):
        raise RecipeError(f"{path} takes a {type(old).__name__} like {old!r}, not {text!r}", param="set")
    return value
