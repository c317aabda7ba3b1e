"""`--set stage.field=value`: a value is checked by the type of its field and the bounds in its annotation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from dd_core.errors import RecipeError

T = TypeVar("T")
_Count = Annotated[int, Field(ge=1)]
_NATURAL: Any = Annotated[int, Field(ge=0)]
_POSITIVE: dict[Any, Any] = {
    int: _Count,
    float: Annotated[float, Field(gt=0, allow_inf_nan=False)],
    tuple[int, ...]: Annotated[tuple[_Count, ...], Field(min_length=1)],
}


def overridden(settings: T, item: str) -> T:
    """Return dataclasses with one field changed.

    Args:
        settings: a dataclass, of which some fields, its parts, are dataclasses too.
        item: `field=value` or `part.field=value`; a value is JSON, or a word where the field takes words. Of
            a whole number, `+value` adds to it.

    Raises:
        RecipeError: there is no such field, or it does not take this value; the message says what it takes.
    """
    path, equals, text = item.partition("=")
    *part, name = path.split(".")
    if not equals or len(part) > 1:
        raise RecipeError(f"--set takes stage.field=value, not {item!r}", param="set")
    owner: Any = settings
    if part:
        owner = getattr(settings, part[0], None)
        if not _is_part(owner):
            found = ", ".join(_names(settings, parts=True))
            raise RecipeError(f"the recipe has no part {part[0]!r}; it has {found}", param="set")
    names = [n for n in _names(owner, parts=False) if part or n != "name"]  # which is --recipe's
    if name not in names:
        where = part[0] if part else "the recipe"
        raise RecipeError(f"{where} has no field {name!r}; it has {', '.join(names)}", param="set")
    old = getattr(owner, name)
    if type(old) is int and text.startswith("+") and text[1:].isdecimal():
        text = str(old + int(text))
    kind = get_type_hints(type(owner), include_extras=True)[name]
    value = _parsed(_bounded(kind, old), text, path)
    try:
        changed = dataclasses.replace(owner, **{name: value})
    except ValueError as error:  # a rule of the dataclass itself
        raise RecipeError(f"{path}: {error}", param="set") from None
    return dataclasses.replace(settings, **{part[0]: changed}) if part else changed  # type: ignore[type-var]


def _is_part(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _names(owner: Any, *, parts: bool) -> list[str]:
    names = (field.name for field in dataclasses.fields(owner))
    return [name for name in names if _is_part(getattr(owner, name)) == parts]


def _bounded(kind: Any, current: object) -> Any:
    """Return the kind of a field with bounds: plain numbers stay as positive as they are."""
    return _NATURAL if kind is int and current == 0 else _POSITIVE.get(kind, kind)


def _parsed(kind: Any, text: str, path: str) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
    try:
        return adapter.validate_python(text, strict=True)
    except ValidationError as error:
        if problem["type"] == "json_invalid":
            problem = error.errors()[0]
    rule = problem["msg"].replace("Input should be", "must be")
    raise RecipeError(f"{path} {rule}, not {text!r}", param="set")
