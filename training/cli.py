"""`dd-train`: one subcommand a stage, over one run folder.

dd-train all --recipe cpu --out runs/cpu          every stage, each resumed where it stopped
dd-train distill --recipe cpu --set distill.steps=6000
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from dd_core.bundle import load_bundle
from dd_core.errors import DDError
from dd_core.hub.locate import locate
from dd_core.runtime import pick_device
from training import parallel, pipeline
from training.data import pictograms
from training.data.captions import read_prompts
from training.metrics.sheet import UNSEEN, draw_sheet
from training.recipes.named import RECIPES, get_recipe
from training.run import Run
from training.stages.export import export as export_bundle
from training.stages.pairs import Job

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Make a bundle: tokenizer, teacher, pairs, student, figures.",
)

_DEFAULT = "gpu" if torch.cuda.is_available() else "cpu"
_OUT = Path("runs/default")
Recipe = Annotated[str, typer.Option(help=f"Named settings: {', '.join(RECIPES)}.")]
Out = Annotated[Path, typer.Option(help="Run folder; a stage that stopped goes on from what is there.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="stage.field=value; may be repeated.")]
StopAfter = Annotated[
    int | None, typer.Option(help="End after that many updates (or shards), as a kill would.")
]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 = torch's choice.")]
Shard = Annotated[str, typer.Option(help="I/N: every N-th shard from shard I on, as job I of 0 to N - 1.")]


class _Stderr(logging.Handler):
    """Writes to what is standard error at that moment: a captured stream may be gone by the next line."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


@contextmanager
def _prepared(
    recipe: str,
    out: Path,
    device: str,
    overrides: list[str] | None,
    stop_after: int | None = None,
    threads: int = 0,
    shard: str = "0/1",
    *,
    together: bool = False,
) -> Iterator[Run]:
    """Give the run of a command; with `together` the processes that torchrun started are connected."""
    chosen = parallel.pick_rank_device(device)
    with parallel.joined(chosen) if together else nullcontext():
        run = Run(get_recipe(recipe, overrides), out, chosen, stop_after, Job.of(shard))
        out.mkdir(parents=True, exist_ok=True)
        _set_up(run, threads)
        yield run


def _set_up(run: Run, threads: int) -> None:
    """Set torch's threads, and log into the run folder; ranks but the first tell their warnings alone."""
    if threads:
        torch.set_num_threads(threads)
    if run.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    main = parallel.is_main()
    handlers: list[logging.Handler] = [logging.FileHandler(run.out / "train.log")] if main else []
    if not (main and sys.stderr.isatty()):
        handlers.append(_Stderr())
    ours = logging.getLogger("dd_train")
    for old in list(ours.handlers):
        ours.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO if main else logging.WARNING)


def _command(name: str, help_text: str, *stages: Callable[[Run], object]) -> None:
    @app.command(name, help=help_text)
    def command(
        recipe: Recipe = _DEFAULT,
        out: Out = _OUT,
        device: Device = "auto",
        overrides: Overrides = None,
        stop_after: StopAfter = None,
        threads: Threads = 0,
    ) -> None:
        together = stages != (pipeline.evaluate,)
        with _prepared(recipe, out, device, overrides, stop_after, threads, together=together) as run:
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
    recipe: Recipe = _DEFAULT,
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
) -> None:
    """Make the pairs, of a file's prompts if there is one."""
    with _prepared(recipe, out, device, overrides, stop_after, threads, shard) as run:
        pipeline.generate_pairs(run, prompts)


@app.command(
    "own-pairs", help="(c') Pairs that begin with the tokens of the student that the run was started from."
)
def own_pairs(
    recipe: Recipe = _DEFAULT,
    out: Out = _OUT,
    device: Device = "auto",
    overrides: Overrides = None,
    stop_after: StopAfter = None,
    threads: Threads = 0,
    shard: Shard = "0/1",
) -> None:
    """Make the pairs that a student begins."""
    with _prepared(recipe, out, device, overrides, stop_after, threads, shard) as run:
        pipeline.generate_own_pairs(run)


_command("distill", "(d) Student by Algorithm 2, from the teacher's weights.", pipeline.distill)
_command("evaluate", "(e) FID, KID, precision and recall of every plan, with its cost.", pipeline.evaluate)
_command(
    "all",
    "Stages (a) to (e) in order, each from where it stopped.",
    *(pipeline.train_tokenizer, pipeline.train_decoder, pipeline.train_teacher),
    *(pipeline.generate_pairs, pipeline.distill, pipeline.evaluate),
)


@app.command("corpus", help="Fetch and draw the pictograms that the recipes for texts learn from.")
def corpus() -> None:
    """Makes the corpus in the cache and says what it is made of."""
    facts = pictograms.build()
    for entry in pictograms.licences():
        number = f"{entry['pictures']:,} pictures" if "pictures" in entry else "names and keywords"
        line = f"{entry['style']}: {entry['name']} {entry['version']}, {entry['licence']}, {number}"
        Console().print(line, highlight=False)
    Console().print(f"{facts}", highlight=False)


@app.command("sheet", help="Draw prompts that are no caption of the corpus, by budget and seed.")
def sheet(
    bundle: Annotated[str, typer.Argument(help="Name or folder of a bundle of texts.")],
    to: Annotated[Path, typer.Option(help="The PNG to write.")],
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line; else our own.")] = None,
    budgets: Annotated[str, typer.Option(help="Most passes of each block, by commas.")] = "1,2,21,64",
    seeds: Annotated[int, typer.Option(help="Rows of a block.")] = 4,
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
    recipe: Recipe = _DEFAULT,
    out: Out = _OUT,
    device: Device = "auto",
    overrides: Overrides = None,
) -> None:
    """Copies the weights and encodes the training images."""
    if parallel.is_main():
        with _prepared(recipe, out, device, overrides) as run:
            pipeline.start_from(run, bundle)


@app.command("export", help="Write the bundle of an evaluated run: what dd-server serves.")
def export(
    to: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    name: Annotated[str, typer.Option(help="The model's name in requests.")] = "cifar10",
    recipe: Recipe = _DEFAULT,
    out: Out = _OUT,
    device: Device = "auto",
    overrides: Overrides = None,
) -> None:
    """Writes the bundle and says how large it became."""
    if not parallel.is_main():
        return
    with _prepared(recipe, out, device, overrides) as run:
        manifest = export_bundle(run, name, to)
    size = sum(f.bytes for f in manifest.files.values())
    Console().print(f"{to}: {len(manifest.presets)} plans, {size / 2**20:.1f} MiB", highlight=False)


def main() -> None:
    """Entry point: one clear line for what the user can mend, no traceback."""
    try:
        app()
    except DDError as error:
        parallel.end(error.message, 1 if isinstance(error, parallel.RankError) else 2)
    except torch.OutOfMemoryError as error:
        hint = "--set accumulate=2 (or more) and --set recompute=true need less"
        parallel.end(f"{str(error).partition('. ')[0]}; {hint}", 1)
