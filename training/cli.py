"""`dd-train`: one subcommand a stage, over one run folder.

dd-train all --recipe cpu --out runs/cpu          every stage, each resumed where it stopped
dd-train all --data photos --size 64 --out runs/photos
dd-train distill --out runs/cpu --set distill.steps=+2000
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from pydantic import TypeAdapter, ValidationError

from dd_core.bundle import load_bundle
from dd_core.errors import DDError, RecipeError
from dd_core.hub.locate import locate
from dd_core.manifest import Manifest
from dd_core.runtime import pick_device
from training import parallel
from training.ablation import Ablation, values_of
from training.ablation import ablate as run_ablation
from training.data import pictograms
from training.data.captions import read_prompts
from training.data.sources import bundle_name
from training.diagnose.run import diagnose as diagnose_run
from training.diagnose.run import open_run, written
from training.examples import choose
from training.guidance import scales_of, sweep
from training.measure import Request, Subject, measure, reference_folder
from training.metrics.features import FeatureExtractor
from training.metrics.sheet import draw_sheet
from training.options import Options, Shard, StopAfter, with_options
from training.prepared import held, prepared
from training.report.page import write_report
from training.run import Run
from training.stages import evaluate as evaluation
from training.stages import export as exporting
from training.stages import own_pairs as own
from training.stages import pairs as noise_data
from training.stages.distill import check_start
from training.stages.order import STAGES, run_all
from training.start import start_from

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Make a bundle: tokenizer, teacher, pairs, student, figures.",
)


def _command(name: str, help_text: str, *stages: Callable[[Run], object]) -> None:
    @app.command(name, help=help_text)
    @with_options
    def command(options: Options, stop_after: StopAfter = None) -> None:
        with prepared(options, stop_after=stop_after, together=True) as run:
            for stage in stages:
                stage(run)


_command("tokenizer", "(a) VQ tokenizer: images to codes and back.", STAGES["tokenizer"])
_command("decoder", "(a') Decoder against a discriminator; the codes stay as they are.", STAGES["decoder"])
_command("teacher", "(b) Autoregressive teacher on the codes.", STAGES["teacher"])


@app.command("pairs", help="(c) Noise-data pairs by Algorithm 1.")
@with_options
def pairs(
    options: Options,
    stop_after: StopAfter = None,
    shard: Shard = "0/1",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, one a line, for a model of texts; else the captions."),
    ] = None,
) -> None:
    """Make the pairs, of a file's prompts if there is one."""
    with prepared(options, stop_after=stop_after, shard=shard) as run:
        noise_data.run(run, prompts)


@app.command(
    "own-pairs", help="(c') Pairs that begin with the tokens of the student that the run was started from."
)
@with_options
def own_pairs(options: Options, stop_after: StopAfter = None, shard: Shard = "0/1") -> None:
    """Make the pairs that a student begins."""
    with prepared(options, stop_after=stop_after, shard=shard) as run:
        own.run(run)


_command("distill", "(d) Student by Algorithm 2, from the teacher's weights.", STAGES["distill"])
_command("all", "Stages (a) to (e) in order, each from where it stopped.", check_start, run_all)


@app.command(
    "ablate", help="FID against epochs for several values of one setting: the paper's Figures 7 and 8."
)
@with_options
def ablate(
    options: Options,
    subject: Annotated[
        Literal["timesteps", "pairs"],
        typer.Argument(help="The student's second step, or the number of pairs it learns from."),
    ],
    steps: Annotated[str | None, typer.Option(help="Second steps, by commas, as 8,20,40.")] = None,
    counts: Annotated[str | None, typer.Option(help="Numbers of pairs, by commas.")] = None,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Updates of each student; by default the recipe's.")
    ] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Updates between two points; by default a fifth of all.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="Images a plan draws for a point; by default the recipe's.")
    ] = None,
    stop_after: StopAfter = None,
) -> None:
    """Distils a student for each value, and draws the curves of all."""
    values = values_of(subject, steps, counts)
    with prepared(options, stop_after=stop_after, together=True) as run:
        many = updates or run.recipe.distill.steps
        asked = Ablation(subject, values, many, every or -(-many // 5), images or run.recipe.evaluate.images)
        run_ablation(run, asked)


@app.command("guidance", help="The teacher's figures at several scales of guidance, before pairs are made.")
@with_options
def guidance(
    options: Options,
    constant: Annotated[
        str, typer.Option(help="Scales of pairs.guidance, by commas, the same in all blocks; 1 = none.")
    ] = "1,2,3",
    linear: Annotated[
        str, typer.Option(help="Scales that grow over the blocks, by commas, as VAR's; 0 = none.")
    ] = "2,4,6",
    images: Annotated[int, typer.Option(min=10, help="Images a scale draws.")] = 500,
) -> None:
    """Writes a table and a picture to RUN/guidance, and shows the table."""
    scales = scales_of(constant, linear)
    with prepared(options, together=True) as run:
        if sweep(run, scales, images):
            typer.echo((run.out / "guidance" / "guidance.md").read_text(encoding="utf-8"))


@app.command("evaluate", help="(e) FID, KID, precision and recall of every plan, with its cost.")
@with_options
def evaluate(
    options: Options,
    bundle: Annotated[
        str | None,
        typer.Argument(
            help="Name or folder of a bundle, built-in and published ones too, whose report goes to --out or "
            "evaluations/NAME; else the run."
        ),
    ] = None,
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
    clip: Annotated[
        Path | None,
        typer.Option(help="Folder of a CLIP model, as transformers saves it, for the CLIP score of texts."),
    ] = None,
    samples: Annotated[bool, typer.Option(help="Write each plan's images as an .npz.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    timing: Annotated[bool, typer.Option(help="Measure the time that an image takes.")] = True,
) -> None:
    """Measures a run on its own data, or a run or a bundle against real images of any kind."""
    chosen = tuple(name for name in plans.split(",") if name)
    asked = Request(
        reference or Path(), images, chosen, captions, inception, samples, batch, seed, timing, clip
    )
    request = None if reference is None else asked
    if bundle is None:
        if request is None and (given := asked.changed()):
            raise RecipeError(
                f"--{given[0]} goes with --reference; a run on its own data is measured by its recipe, which "
                "--set evaluate.images=500 changes",
                param=given[0],
            )
        with prepared(options, together=True) as run:
            if request is None:
                evaluation.run(run)
                return
            with parallel.in_turn():
                subject, extractor = Subject.of_run(run), FeatureExtractor(run.device)
            measure(subject, request, extractor, reference_folder(run))
        return
    if request is None:
        raise RecipeError("a bundle is measured against --reference, a folder or an .npz", param="reference")
    if options.overrides:
        raise RecipeError("--set changes a recipe, and a bundle has none", param="set")
    out = options.out or Path("evaluations") / Path(bundle).name
    device = parallel.pick_rank_device(options.device)
    with parallel.joined(device):
        with parallel.in_turn():
            subject, extractor = Subject.of_bundle(bundle, device), FeatureExtractor(device)
        with held(out, device, options.threads):
            if measure(subject, request, extractor, out):
                typer.echo((out / "evaluation.md").read_text(encoding="utf-8"))


@app.command("corpus", help="Fetch and draw the pictograms that the recipes for texts learn from.")
def corpus() -> None:
    """Makes the corpus in the cache and says what it is made of."""
    facts = pictograms.build()
    for entry in pictograms.licences():
        number = f"{entry['pictures']:,} pictures" if "pictures" in entry else "names and keywords"
        line = f"{entry['style']}: {entry['name']} {entry['version']}, {entry['licence']}, {number}"
        typer.echo(line)
    typer.echo(f"{facts}")


def _checked_budgets(value: str | None) -> str | None:
    if value is not None and not all(each.strip().isdecimal() and int(each) for each in value.split(",")):
        raise typer.BadParameter(f"numbers of passes with commas between, as 1,2,21, not {value!r}")
    return value


def _bundle_name(value: str | None) -> str | None:
    rule = Manifest.model_fields["name"]
    try:
        TypeAdapter(Annotated[str, rule] | None).validate_python(value)
    except ValidationError as error:
        raise typer.BadParameter(error.errors()[0]["msg"]) from None
    return value


@app.command("sheet", help="Draw classes or prompts, of each seed a block with a row for each budget.")
def sheet(
    bundle: Annotated[str, typer.Argument(help="Name or folder of a bundle.")],
    to: Annotated[Path, typer.Option(help="The PNG to write.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts or classes, one a line; else some that are no caption of the corpus, or "
            "the first 20 classes."
        ),
    ] = None,
    examples: Annotated[bool, typer.Option("--examples", help="Those that the model's page offers.")] = False,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Most passes of each row of a block, by commas; else what the model's plans cost.",
            callback=_checked_budgets,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many blocks.")] = 4,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Most pictures of a row; others are in more blocks.")
    ] = None,
    scale: Annotated[int, typer.Option(min=1, max=16, help="Screen pixels to a pixel.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Writes the picture and says which plans its rows are of."""
    if examples and prompts:
        raise RecipeError("--prompts or --examples, not both", param="prompts")
    loaded = load_bundle(locate(bundle), pick_device(device))
    chosen = read_prompts(prompts) if prompts else loaded.manifest.examples if examples else ()
    if examples and not chosen:
        raise RecipeError(f"{loaded.name} has no examples", param="examples")
    most = [int(each) for each in budgets.split(",")] if budgets else []
    plans = draw_sheet(loaded, to, chosen, most, seeds, scale, columns)
    typer.echo(f"{to}: {seeds} blocks of {', '.join(plans)}")


@app.command("examples", help="Names of the corpus that a run's student draws well, by measurement.")
@with_options
def examples(
    options: Options,
    budget: Annotated[int, typer.Option(min=1, help="Most passes of a picture.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each name.")] = 4,
    names: Annotated[int, typer.Option(min=0, help="The first names only; 0 = all.")] = 0,
    least: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of right pictures of a name that is kept.")
    ] = 0.5,
    shown: Annotated[int, typer.Option(min=1, help="How many to print.")] = 24,
) -> None:
    """Writes them to the run folder, where `export` takes a bundle's examples from."""
    with prepared(options) as run:
        for found in choose(run, budget, seeds, names, least)[:shown]:
            typer.echo(f"{found.right:4.0%}  {found.margin:+.3f}  {found.name}")


@app.command("start", help="Begin a run with a bundle's weights, or another run's tokenizer.")
@with_options
def start(
    options: Options,
    bundle: Annotated[str, typer.Argument(help="Name or folder of a bundle.")],
) -> None:
    """Copies the weights and encodes the training images."""
    if parallel.is_main():
        with prepared(options) as run:
            start_from(run, bundle)


@app.command("export", help="Write the bundle of an evaluated run: what dd-server serves.")
@with_options
def export(
    options: Options,
    to: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    name: Annotated[
        str | None,
        typer.Option(
            help="The model's name in requests; by default that of the data.", callback=_bundle_name
        ),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Tokenizer and teacher alone, as they are, for dd-train start.")
    ] = False,
) -> None:
    """Writes the bundle and says how large it became."""
    if not parallel.is_main():
        return
    with prepared(options) as run:
        write = exporting.run_teacher if teacher else exporting.run
        manifest = write(run, name or bundle_name(run.recipe), to)
    size = sum(f.bytes for f in manifest.files.values())
    typer.echo(f"{to}: {len(manifest.presets)} plans, {size / 2**20:.1f} MiB")


@app.command("diagnose", help="Say why a run is as it is: codes, memorisation, jumps, and what to do.")
def diagnose(
    run: Annotated[Path, typer.Argument(help="Run folder; its stages need not be finished.")],
    pairs: Annotated[int, typer.Option(min=2, help="Fresh pairs to make, and images to look at.")] = 300,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 = torch's choice.")] = 0,
) -> None:
    """Writes the findings, and diagnosis.json in the run folder. The run may be under way meanwhile."""
    if not parallel.is_main():
        return
    if threads:
        torch.set_num_threads(threads)
    typer.echo(written(diagnose_run(open_run(run, pick_device(device)), pairs)))


@app.command("report", help="Show runs side by side on one page of HTML: tables, curves, pictures.")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    to: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Writes the page and says where it is."""
    write_report(runs, to)
    typer.echo(f"{to}: {to.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    """Entry point: one clear line for what the user can mend, no traceback."""
    try:
        app()
    except (DDError, OSError) as error:
        ours = isinstance(error, DDError) and not isinstance(error, parallel.RankError)
        parallel.end(error.message if isinstance(error, DDError) else str(error), 2 if ours else 1)
    except torch.OutOfMemoryError as error:
        hint = "--set accumulate=2 (or more) and --set recompute=true need less; pairs, a smaller pairs.batch"
        parallel.end(f"{str(error).partition('. ')[0]}; {hint}", 1)
