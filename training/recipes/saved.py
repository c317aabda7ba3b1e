"""`recipe.json` of a run folder: the recipe that the run was begun with, for the commands that follow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dd_core.errors import RecipeError
from dd_core.files import replacing
from training.lock import locked, shared
from training.mismatch import refuse_mismatch
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
_FREE = {"pairs.batch"}  # it changes nothing but how much memory is needed


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
    """Hold the run folder and keep the recipe in it; what a command asked for that was refused, or failed,
    is forgotten again, unless stages have gone by it already.

    Raises:
        RecipeError: another process works in the folder.
    """
    with locked(out):
        before, traces = _replaced(out, _bytes(recipe)), _traces(out)
        try:
            yield
        except Exception:
            if _traces(out) == traces:
                _replaced(out, before)
            raise


@contextmanager
def agreed(out: Path, recipe: Recipe) -> Iterator[None]:
    """Hold the run folder together with other jobs of one recipe, which the first one keeps in it.

    What a job asked for that was refused, or failed, is forgotten again where no other job and no stage has
    gone by it.

    Raises:
        RecipeError: other jobs go by another recipe, or another command works in the folder.
    """
    before: list[bytes | None] = []
    with shared(out, lambda: before.append(_replaced(out, _bytes(recipe)))) as left_alone:
        found = read_recipe(out)
        if found is not None:
            refuse_mismatch(
                out / "recipe.json",
                _comparable(found),
                _comparable(recipe),
                "give all jobs the same settings",
            )
        traces = _traces(out)
        try:
            yield
        except Exception:
            if before and left_alone() and _traces(out) == traces:
                _replaced(out, before[0])
            raise


def _comparable(recipe: Recipe) -> dict[str, object]:
    """The settings without the place of the images, which may be another one on each machine."""
    return asdict(
        recipe if recipe.folder is None else replace(recipe, folder=replace(recipe.folder, path=""))
    )


def _bytes(recipe: Recipe) -> bytes:
    return json.dumps(asdict(recipe), indent=1).encode()


def _replaced(out: Path, data: bytes | None) -> bytes | None:
    """Write or remove `recipe.json`, and give what it was."""
    path = out / "recipe.json"
    before = path.read_bytes() if path.exists() else None
    if data is None:
        path.unlink(missing_ok=True)
    else:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    return before


def _traces(out: Path) -> dict[str, int]:
    """What stages have left in the run folder, and when each last did."""
    found = (out / name for name in (*_BEGUN.values(), "tokenizer.safetensors"))
    return {path.name: path.stat().st_mtime_ns for path in found if path.exists()}


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
            if old == wanted or f"{part}.{field}" in _FREE:
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
