"""Settings that something on disk was made with, held against those that are asked for now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dd_core.errors import RecipeError

_SHOWN = 40  # characters of a value that a message repeats
# Settings that came later: in what was made before, these stood for them.
_LATER: dict[str, object] = {
    "text_tokens": 0,
    "text_dim": 0,
    "tokenizer.adversarial": 0.0,
    "tokenizer.enlarged": 1,
    "tokenizer.judged_from": 0.5,
    "tokenizer.judge_lr": 5e-4,
    "tokenizer.ramp": 0.05,
    "decoder.enlarged": 1,
    "teacher.replaced": 0.0,
    "decoder.drawn": 0.0,
    "distill.enlarged": 1,
    "distill.evenness": 0.0,
}


def refuse_mismatch(what: object, made: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Do nothing where both settings are the same.

    Args:
        what: the file or folder that was made with `made`.
        remedy: advice for the user.

    Raises:
        RecipeError: they differ; the message and `param` name the first field that does.
    """
    for name, before, now in differences(made, wanted):
        raise RecipeError(
            f"{what} was made with other settings: {name} was {before} and is {now}; {remedy}", param=name
        )


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Return the first field that differs, in words."""
    found = (f"{name} is {there}, not {here}" for name, there, here in differences(theirs, ours))
    return next(found, "its teacher is not its student's")


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield each field that differs, by its dotted name, with both values as JSON.

    A setting that came later and is absent from either has the value that it had before it could be set.
    """
    before, now = dict(_flat(made)), dict(_flat(wanted))
    for name in before | now:
        then, here = (found.get(name, _unset(name)) for found in (before, now))
        if then != here:
            yield name, _shown(then), _shown(here)


def _unset(name: str) -> str:
    """What stands for a setting where it is not written."""
    for end in (name, name.rpartition(".")[2]):
        if end in _LATER:
            return json.dumps(_LATER[end])
    return "absent"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value)  # which has no tuples: they are lists


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
