"""`dd-train`: one subcommand a stage, over one run folder.

dd-train all --recipe cpu --out runs/cpu          every stage, each resumed where it stopped
dd-train all --data photos --size 64 --out runs/photos
dd-train distill --out runs/cpu --set distill.steps=+2000
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from dd_core.bundle import load_bundle
from dd_core.errors import DDError, RecipeError
from dd_core.hub.locate import locate
from dd_core.manifest import Manifest
from dd_core.runtime import pick_device
from training import parallel, pipeline
from training.data import pictograms
from training.data.captions import read_prompts
from training.data.sources import bundle_name
from training.lock import locked
from training.measure import Request, Subject, measure
from training.metrics.features import FeatureExtractor
from training.metrics.sheet import UNSEEN, draw_sheet
from training.presets import presets
from training.recipes.choose import DEFAULT, choose_recipe
from training.recipes.named import RECIPES
from training.recipes.saved import remembered
from training.run import Run
from training.stages.export import export as export_bundle
from training.stages.pairs import Job
from training.start import start_from

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Make a bundle: tokenizer, teacher, pairs, student, figures.",
)

_OUT = Path("runs/default")
Recipe = Annotated[
    str | None,
    typer.Option(
        help=f"Named settings: {', '.join(RECIPES)}. By default those that the run folder was begun with, or "
        f"{DEFAULT}."
    ),
]
Out = Annotated[Path, typer.Option(help="Run folder; a stage that stopped goes on from what is there.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="stage.field=value, or +value for more of it; may be repeated, and lasts."),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Your own images: a folder with one sub-folder a class. The run folder remembers it."),
]
Size = Annotated[
    int | None, typer.Option(help="Side in pixels to which the images of --data are cropped and resized.")
]
StopAfter = Annotated[
    int | None, typer.Option(min=1, help="End after that many updates (or shards), as a kill would.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 = torch's choice.")]
Shard = Annotated[str, typer.Option(help="I/N: every N-th shard from shard I on, as job I of 0 to N - 1.")]


class _Stderr(logging.Handler):
    """Writes to what is standard error at that moment: a captured stream may be gone by the next line."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


@contextmanager
def _prepared(
    recipe: str | None,
    out: Path,
    device: str,
    overrides: list[str] | None,
    stop_after: int | None = None,
    threads: int = 0,
    data: Path | None = None,
    size: int | None = None,
    shard: str | None = None,
    *,
    together: bool = False,
) -> Iterator[Run]:
    """Give the run of a command. No other command may use its folder meanwhile, which remembers its recipe.

    Args:
        shard: the part of a set of pairs that this job makes. Jobs share the folder, so several neither hold
            it nor change its recipe.
        together: connect the processes that torchrun started, of which rank 0 holds the folder.

    Raises:
        RecipeError: settings that cannot be, a folder in use, or a run that was begun with other settings.
    """
    chosen, job = parallel.pick_rank_device(device), Job.of(shard or "0/1")
    alone = parallel.is_main() if shard is None else job.of_rank() == Job()
    with parallel.joined(chosen) if together else nullcontext(), ExitStack() as held:
        _log_to()
        with parallel.in_turn():
            if together and not parallel.is_main():  # rank 0 has written down what it chose
                settings = choose_recipe(out, None)
            else:
                settings = choose_recipe(out, recipe, overrides or (), data, size)
            presets(settings)  # plans that there are not are refused now, not after the training
            out.mkdir(parents=True, exist_ok=True)
            if alone:
                held.enter_context(locked(out))
                held.enter_context(remembered(out, settings))
        _set_up(out, chosen, threads)
        yield Run(settings, out, chosen, stop_after, job)


def _set_up(out: Path, device: torch.device, threads: int) -> None:
    """Set torch's threads, and log into the folder; ranks but the first tell their warnings alone."""
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    _log_to(*([logging.FileHandler(out / "train.log")] if parallel.is_main() else []))


def _log_to(*handlers: logging.Handler) -> None:
    """Log there, and to standard error where that is no terminal, which has progress bars."""
    ours = logging.getLogger("dd_train")
    for old in list(ours.handlers):
        ours.removeHandler(old)
        old.close()
    main = parallel.is_main()
    for handler in (*handlers, *([] if main and sys.stderr.isatty() else [_Stderr()])):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO if main else logging.WARNING)


def _command(name: str, help_text: str, *stages: Callable[[Run], object]) -> None:
    @app.command(name, help=help_text)
    def command(
        recipe: Recipe = None,
        out: Out = _OUT,
        device: Device = "auto",
        overrides: Overrides = None,
        stop_after: StopAfter = None,
        threads: Threads = 0,
        data: Data = None,
        size: Size = None,
    ) -> None:
        with _prepared(recipe, out, device, overrides, stop_after, threads, data, size, together=True) as run:
            for stage in stages:
                if stage is not pipeline.evaluate or parallel.leave():
                    stage(run)


_command("tokenizer", "(a) VQ tokenizer: images to codes and back.", pipeline.train_tokenizer)
_command(
    "decoder", "(a') Decoder against a discriminator; the codes stay as they are.", pipeline.train_decoder
)
_command("teacher", "(b) Autoregressive teacher on the codes.", pipeline.train_teacher)


@app.command("pairs", help="(c) Noise-data pairs by Algorithm 1.")
def pairs(
    recipe: Recipe = None,
    out: Out = _OUT,
    device: Device = "auto",
    overrides: Overrides = None,
    stop_after: StopAfter = None,
    threads: Threads = 0,
    shard: Shard = "0/1",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, one a line, for a model of texts; else the captions."),
    ] = None,
    data: Data = None,
    size: Size = None,
) -> None:
    """Make the pairs, of a file's prompts if there is one."""
    with _prepared(recipe, out, device, overrides, stop_after, threads, data, size, shard) as run:
        pipeline.generate_pairs(run, prompts)


@app.command(
    "own-pairs", help="(c') Pairs that begin with the tokens of the student that the run was started from."
)
def own_pairs(
    recipe: Recipe = None,
    out: Out = _OUT,
    device: Device = "auto",
    overrides: Overrides = None,
    stop_after: StopAfter = None,
    threads: Threads = 0,
    data: Data = None,
    size: Size = None,
    shard: Shard = "0/1",
) -> None:
    """Make the pairs that a student begins."""
    with _prepared(recipe, out, device, overrides, stop_after, threads, data, size, shard) as run:
        pipeline.generate_own_pairs(run)


_command("distill", "(d) Student by Algorithm 2, from the teacher's weights.", pipeline.distill)
_command(
    "all",
    "Stages (a) to (e) in order, each from where it stopped.",
    *(pipeline.train_tokenizer, pipeline.train_decoder, pipeline.train_teacher),
    *(pipeline.generate_pairs, pipeline.distill, pipeline.evaluate),
)


@app.command("evaluate", help="(e) FID, KID, precision and recall of every plan, with its cost.")
def evaluate(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Name or folder of a bundle, built-in and published ones too; else the run."),
    ] = None,
    recipe: Recipe = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Run folder ({_OUT}), or the folder of a bundle's report.")
    ] = None,
    device: Device = "auto",
    overrides: Overrides = None,
    data: Data = None,
    size: Size = None,
    stop_after: StopAfter = None,
    threads: Threads = 0,
    reference: Annotated[
        Path | None,
        typer.Option(help="Real images: a folder of pictures, or an .npz as ADM's evaluator reads it."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images a plan draws.")] = 50_000,
    plans: Annotated[str, typer.Option(help="Names of plans, by commas; none = all.")] = "",
    captions: Annotated[
        Path | None, typer.Option(help="Captions of the pictures of --reference; else those beside them.")
    ] = None,
    inception: Annotated[
        str | None,
        typer.Option(help="pytorch-fid's weights for the Inception score, or 'fetch'; without, no score."),
    ] = None,
    samples: Annotated[bool, typer.Option(help="Write each plan's images as an .npz.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    timing: Annotated[bool, typer.Option(help="Measure the time that an image takes.")] = True,
) -> None:
    """Measures a run on its own data, or a run or a bundle against real images of any kind."""
    if not parallel.is_main():
        return
    chosen = tuple(name for name in plans.split(",") if name)
    request = None
    if reference is not None:
        request = Request(reference, images, chosen, captions, inception, samples, batch, seed, timing)
    if bundle is None:
        with _prepared(recipe, out or _OUT, device, overrides, stop_after, threads, data, size) as run:
            if request is None:
                pipeline.evaluate(run)
            else:
                extractor = FeatureExtractor(run.device)
                measure(pipeline.subject_of(run), request, extractor, pipeline.reference_folder(run))
        return
    if request is None:
        raise RecipeError("a bundle is measured against --reference, a folder or an .npz", param="reference")
    if overrides:
        raise RecipeError("--set changes a recipe, and a bundle has none", param="set")
    out = out or Path("evaluations") / Path(bundle).name
    where = pick_device(device)
    subject = Subject.of_bundle(bundle, where)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _set_up(out, where, threads)
        measure(subject, request, FeatureExtractor(where), out)
        typer.echo((out / "evaluation.md").read_text(encoding="utf-8"))


@app.command("corpus", help="Fetch and draw the pictograms that the recipes for texts learn from.")
def corpus() -> None:
    """Makes the corpus in the cache and says what it is made of."""
    facts = pictograms.build()
    for entry in pictograms.licences():
        number = f"{entry['pictures']:,} pictures" if "pictures" in entry else "names and keywords"
        line = f"{entry['style']}: {entry['name']} {entry['version']}, {entry['licence']}, {number}"
        Console().print(line, highlight=False)
    Console().print(f"{facts}", highlight=False)


def _checked_budgets(value: str) -> str:
    if not all(each.strip().isdecimal() and int(each) for each in value.split(",")):
        raise typer.BadParameter(f"numbers of passes with commas between, as 1,2,21, not {value!r}")
    return value


def _bundle_name(value: str | None) -> str | None:
    rule = Manifest.model_fields["name"]
    try:
        TypeAdapter(Annotated[str, rule] | None).validate_python(value)
    except ValidationError as error:
        raise typer.BadParameter(error.errors()[0]["msg"]) from None
    return value


@app.command("sheet", help="Draw prompts that are no caption of the corpus, by budget and seed.")
def sheet(
    bundle: Annotated[str, typer.Argument(help="Name or folder of a bundle of texts.")],
    to: Annotated[Path, typer.Option(help="The PNG to write.")],
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line; else our own.")] = None,
    budgets: Annotated[
        str, typer.Option(help="Most passes of each block, by commas.", callback=_checked_budgets)
    ] = "1,2,21,64",
    seeds: Annotated[int, typer.Option(min=1, help="Rows of a block.")] = 4,
    device: Device = "auto",
) -> None:
    """Writes the picture and says which plans its blocks are of."""
    loaded = load_bundle(locate(bundle), pick_device(device))
    chosen = read_prompts(prompts) if prompts else UNSEEN
    plans = draw_sheet(loaded, to, chosen, [int(each) for each in budgets.split(",")], seeds)
    typer.echo(f"{to}: {len(chosen)} prompts, blocks of {seeds} rows: {', '.join(plans)}")


@app.command("start", help="Begin a run with a bundle's weights instead of training them anew.")
def start(
    bundle: Annotated[str, typer.Argument(help="Name or folder of a bundle.")],
    recipe: Recipe = None,
    out: Out = _OUT,
    device: Device = "auto",
    overrides: Overrides = None,
    data: Data = None,
    size: Size = None,
) -> None:
    """Copies the weights and encodes the training images."""
    if parallel.is_main():
        with _prepared(recipe, out, device, overrides, data=data, size=size) as run:
            start_from(run, bundle)


@app.command("export", help="Write the bundle of an evaluated run: what dd-server serves.")
def export(
    to: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    name: Annotated[
        str | None,
        typer.Option(
            help="The model's name in requests; by default that of the data.", callback=_bundle_name
        ),
    ] = None,
    recipe: Recipe = None,
    out: Out = _OUT,
    device: Device = "auto",
    overrides: Overrides = None,
    data: Data = None,
    size: Size = None,
) -> None:
    """Writes the bundle and says how large it became."""
    if not parallel.is_main():
        return
    with _prepared(recipe, out, device, overrides, data=data, size=size) as run:
        manifest = export_bundle(run, name or bundle_name(run.recipe), to)
    size = sum(f.bytes for f in manifest.files.values())
    Console().print(f"{to}: {len(manifest.presets)} plans, {size / 2**20:.1f} MiB", highlight=False)


def main() -> None:
    """Entry point: one clear line for what the user can mend, no traceback."""
    try:
        app()
    except (DDError, OSError) as error:
        ours = isinstance(error, DDError) and not isinstance(error, parallel.RankError)
        parallel.end(error.message if isinstance(error, DDError) else str(error), 2 if ours else 1)
    except torch.OutOfMemoryError as error:
        hint = "--set accumulate=2 (or more) and --set recompute=true need less"
        parallel.end(f"{str(error).partition('. ')[0]}; {hint}", 1)
