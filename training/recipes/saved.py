"""`recipe.json` of a run folder: the recipe that the run was begun with, for the commands that follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dd_core.errors import RecipeError
from dd_core.files import replacing
from training.recipes.settings import Recipe

_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
# What a stage leaves as soon as it has begun, in the order in which one needs the other; the decoder is
# needed by none.
_BEGUN = {
    "tokenizer": "tokenizer.pt",
    "decoder": "decoder.pt",
    "teacher": "teacher.pt",
    "pairs": "pairs/manifest.json",
    "distill": "student.pt",
}
_GROWS = {"steps", "count", "own"}


def read_recipe(out: Path) -> Recipe | None:
    """The recipe of a run folder; None where there is none yet.

    Raises:
        RecipeError: the file is no recipe.
    """
    path = out / "recipe.json"
    if not path.exists():
        return None
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise RecipeError(f"{path}: {where}: {problem['msg']}", param="recipe") from None


@contextmanager
def remembered(out: Path, recipe: Recipe) -> Iterator[None]:
    """Keep the recipe in the run folder; what a refused command asked for is forgotten again."""
    path = out / "recipe.json"
    before = path.read_bytes() if path.exists() else None
    _write(path, json.dumps(asdict(recipe), indent=1).encode())
    try:
        yield
    except RecipeError:
        if before is None:
            path.unlink()
        else:
            _write(path, before)
        raise


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def has_begun(out: Path) -> bool:
    """True once a stage has left something in the run folder, or a bundle was put there to start from."""
    return any((out / name).exists() for name in (*_BEGUN.values(), "tokenizer.safetensors"))


def check_changes(out: Path, before: Recipe, now: Recipe) -> None:
    """Do nothing if the stages that have begun can go on: more steps and more pairs are all that they take.

    Raises:
        RecipeError: a setting of theirs has changed, or what a later stage was made of would; the message
            names it and its value.
    """
    begun = [part for part, name in _BEGUN.items() if (out / name).exists()]
    for part in begun:
        was, new = getattr(before, part), getattr(now, part)
        for field in (f.name for f in fields(was)):
            old, wanted = getattr(was, field), getattr(new, field)
            if old == wanted:
                continue
            if field not in _GROWS or wanted < old:
                raise RecipeError(
                    f"{out} has {_BEGUN[part]} with {part}.{field} {_json(old)}, not {_json(wanted)}; "
                    "choose another --out",
                    param=f"{part}.{field}",
                )
            later = begun[begun.index(part) + 1 :] if part != "decoder" and field != "own" else []
            if later:
                raise RecipeError(
                    f"{part}.{field} cannot grow any more: {out} has {_BEGUN[later[0]]}, made of what there "
                    "was; remove that and what follows, or choose another --out",
                    param=f"{part}.{field}",
                )


def _json(value: object) -> str:
    return json.dumps(value)
