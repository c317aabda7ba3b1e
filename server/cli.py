"""`dd-server`: serve a model, make one image, list, fetch and convert models.

Exit codes: 0, 2 for what the user can put right (an unknown class, a port that is taken, a model
that does not exist), 1 for everything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from dd_core.bundle import DEFAULT_BUNDLE, DEFAULT_TEXT_BUNDLE, load_bundle
from dd_core.engine.arithmetic import EXACT32
from dd_core.errors import BundleNotFoundError, DDError, InvalidRequestError
from dd_core.hub.spec import PartName
from dd_core.noise import NoiseKey
from dd_core.runtime import pick_device
from dd_core.sampling import sample_images
from distilled_decoding.contract import MAX_SEED, SUFFIXES
from server.generation.encoder import encode, read_receipt
from server.generation.receipts import Receipt, parse_receipt
from server.models.catalog import find, sources_of
from server.models.listing import convert_model, listing, named_class, passes, pull_lines
from server.observability.metrics import package_version
from server.observability.writing import say_last
from server.settings import ENV_PREFIX, Settings, load_settings, show

app = typer.Typer(
    name="dd-server",
    help="One-step image generation over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_MODEL = "Built-in or published model, or a bundle's folder."
_NAME = "Published model, as `dd-server models` lists them."


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting but the models, which are its argument."""
    own = signature(command, eval_str=True).parameters.values()
    parameters = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    for name, field in Settings.model_fields.items():
        if name == "model":
            continue
        kinds: dict[Any, type] = {int: int, float: float, bool: bool, Path | None: Path}
        kind = kinds.get(field.annotation, str)
        flag = name.replace("_", "-")
        default = show(field.get_default(call_default_factory=True, validated_data={}))
        option = typer.Option(
            f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
            help=f"{field.description} [env: {ENV_PREFIX}{name.upper()}; default: {default}]",
            show_default=False,
        )
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(package_version())
        raise typer.Exit


@app.command()
@_with_settings
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"{_MODEL} Several may be served. "
            f"[env: DD_SERVER_MODEL; default: {show(Settings.model_fields['model'].default)}]"
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Serve models over HTTP; published ones are fetched first. A flag wins over its variable."""
    # FastAPI and uvicorn: the other commands start faster without.
    from server import launcher
    from server.app import create_app
    from server.devices.placement import devices_of

    settings = load_settings(**flags, model=",".join(models) if models else None)
    devices_of(settings.device)
    launcher.prepare(settings)
    bound = launcher.bind(settings.host, settings.port)
    with bound:  # a port that is taken is told before a model is fetched
        named = models or [settings.model]
        served = launcher.find_served([source for text in named for source in sources_of(text)])
        launcher.serve(create_app(settings, served), settings, bound)


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="File to write; its suffix (.png, .jpg, .webp) is the format.")],
    label: Annotated[str | None, typer.Option(help="Class name, or class index.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text, for models that are conditioned on it.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="The image is a function of this number.")
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Step budget: the most forward passes to spend; left out, the fewest.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Instead of --steps: a plan by name, as `dd-server models` lists them.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"{_MODEL} The built-in one that takes what is sent, if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Make one image without a server: the same image as image 0 of a request with this seed."""
    if out.suffix.lower() not in SUFFIXES:
        raise InvalidRequestError(f"--out must end in {', '.join(SUFFIXES)}, not {out.suffix!r}", param="out")
    if steps is not None and plan is not None:
        raise InvalidRequestError("send either --steps or --plan, not both", param="plan")
    served = find(model or (DEFAULT_BUNDLE if prompt is None else DEFAULT_TEXT_BUNDLE))
    budget = served.budgets.least if steps is None else steps
    chosen = (served.budgets.pick(budget) if plan is None else served.preset(plan)).plan
    named = int(label) if label is not None and label.isascii() and label.isdigit() else label
    condition = served.condition(named, prompt)
    bundle = load_bundle(served.folder, pick_device(device), EXACT32)
    if isinstance(condition, str):
        assert bundle.text is not None, "a model without an encoder is not found"
        pixels = sample_images(bundle.sampler, chosen, bundle.text.encode([condition]), [(seed, 0)])
    else:
        pixels = sample_images(bundle.sampler, chosen, [condition], [(seed, 0)])
    identity = served.identities[chosen.name]
    receipt = Receipt.of(served.name, identity, condition, chosen.name, NoiseKey(seed, 0))
    out.write_bytes(encode(pixels[0].numpy(), SUFFIXES[out.suffix.lower()], str(receipt)))
    what = condition if isinstance(condition, str) else served.manifest.classes[condition]
    typer.echo(f"{out}: {what}, seed {seed}, plan {chosen.name}, {passes(chosen.cost)}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An image that this server made.")],
    model: Annotated[
        str | None, typer.Option(help=f"{_MODEL} The one of the receipt's name, if left out.")
    ] = None,
) -> None:
    """Print the receipt in an image's metadata, and what it says; a class by name where its model is here."""
    word = read_receipt(file)
    receipt = parse_receipt(word)
    typer.echo(word)
    for line in receipt.lines(named_class(receipt, model)):
        typer.echo(f"  {line}")


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(help=f"{_MODEL} Left out, every one.")] = None,
) -> None:
    """List models with their plans, what these cost and the FID that they were measured at."""
    for line in listing(model):
        typer.echo(line)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help=_NAME)],
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="The student and tokenizer alone.")
    ] = False,
) -> None:
    """Fetch a published model's files into the hub's cache; what was begun before is gone on with."""
    for line in pull_lines(name, no_teacher=no_teacher):
        typer.echo(line)


@app.command()
def convert(
    name: Annotated[str, typer.Argument(help=_NAME)],
    tokenizer: Annotated[Path | None, typer.Option(help="Its checkpoint; left out, the hub's.")] = None,
    student: Annotated[Path | None, typer.Option(help="Its checkpoint; left out, the hub's.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Its checkpoint; left out, the hub's.")] = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder of the bundle; left out, where `serve NAME` finds it.")
    ] = None,
    no_teacher: Annotated[
        bool, typer.Option("--no-teacher", help="Leave the teacher out, and the plans that need it.")
    ] = False,
    unmasked_prefix: Annotated[
        bool,
        typer.Option(
            "--unmasked-prefix",
            help="VAR hybrids as the released script runs them: the teacher reads a prefix without a mask.",
        ),
    ] = False,
) -> None:
    """Make a bundle of published checkpoints: of files at hand, or of the hub's."""
    given: dict[PartName, Path | None] = {"tokenizer": tokenizer, "student": student, "teacher": teacher}
    by_hand = {part: path for part, path in given.items() if path is not None}
    said = convert_model(name, by_hand, to, no_teacher=no_teacher, unmasked_prefix=unmasked_prefix)
    typer.echo(said)


def main() -> None:
    """The console script: one clear line for every deliberate error."""
    try:
        app()
    except DDError as error:
        say_last(f"dd-server: error: {error.message}")
        sys.exit(2 if isinstance(error, (InvalidRequestError, BundleNotFoundError)) else 1)
    except OSError as error:
        say_last(f"dd-server: error: {error}")
        sys.exit(1)
