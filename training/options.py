"""The options that the commands of `dd-train` share, as one argument of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from training.recipes.named import DEFAULT, RECIPES

_RUN = Path("runs/default")


@dataclass(frozen=True)
class Options:
    """Which run, on what, and with which changes; each field is an option."""

    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"Named settings: {', '.join(RECIPES)}. By default those that the run folder was begun "
            f"with, or {DEFAULT}."
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder; a stage that stopped goes on from what is there.", show_default=str(_RUN)
        ),
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="stage.field=value, or +value for more of it; may be repeated, and lasts."
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            help="Your own images: a folder with one sub-folder a class. The run folder remembers it."
        ),
    ] = None
    size: Annotated[
        int | None, typer.Option(help="Side in pixels to which the images of --data are cropped and resized.")
    ] = None
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = torch's choice.")] = 0

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out or _RUN


StopAfter = Annotated[
    int | None, typer.Option(min=1, help="End after that many updates (or shards), as a kill would.")
]
Shard = Annotated[
    str | None, typer.Option(help="I/N: every N-th shard from shard I on, as job I of 0 to N - 1.")
]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option for each field of `Options`, of which it gets one object, `options`."""
    shared, own = _hints(Options), _hints(command)
    names = [field.name for field in fields(Options)]
    defaults = inspect.signature(command).parameters
    parameters = [(name, shared[name], getattr(Options, name)) for name in names]
    parameters += [(name, own[name], p.default) for name, p in defaults.items() if name != "options"]

    def called(**values: Any) -> None:
        command(options=Options(**{name: values.pop(name) for name in names}), **values)

    called.__doc__ = command.__doc__
    called.__annotations__ = {name: kind for name, kind, _ in parameters}
    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, kind, default in parameters
        ]
    )
    return called


def _hints(owner: object) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)
