"""One step by recorded graphs: naive, operation by operation, exact and fast, on the same random weights.

    each arithmetic: warm up (records) → repeats × (every lane in turn) → images/s; exact ÷ fast; teacher

`exact` stays the default on a GPU if it reaches 80 % of the speed of `fast` at the largest batch of every
model, so that bytes cost a fifth at most; the table says if it does. A CPU has no graphs: there the same
passes run on the tests' recorder, which shows that the benchmark works and nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

import torch

from benchmarks import report
from benchmarks.agreement import Made, agreement, check
from benchmarks.naive import (
    ALL,
    SEED,
    SIZES,
    SMOKE,
    Size,
    Work,
    identity_of,
    in_arithmetic,
    in_turn,
    naive,
    ours,
    prepare,
)
from dd_core import plan
from dd_core.condition import ClassCondition
from dd_core.engine.arithmetic import choose
from dd_core.engine.cuda import CudaGraphs, settle
from dd_core.engine.graphs import GraphRunner, Graphs
from dd_core.engine.prepared import prepare_teacher
from dd_core.models.build import new_teacher, new_tokenizer
from dd_core.noise import NoiseKey
from dd_core.plan import Plan
from dd_core.runtime import pick_device
from tests.dd_core.engine.recorded import RecordedGraphs

THEME = "graphs"
LEAST_SHARE = 0.8  # of fast, from which on exact is the default
LANES = ("naive", "eager", "exact", "fast")
_SMOKE = ("--models", ",".join(SMOKE), "--batches", "2", "--repeats", "2")


def graphs_of(device: torch.device) -> Graphs:
    """Those of a GPU, or the tests' recorder."""
    return CudaGraphs(device, Lock()) if device.type == "cuda" else RecordedGraphs()


def on_runner(work: Work, exact: bool, chosen: Plan) -> Callable[[], Made]:
    """Images of a plan by a `GraphRunner` that holds them: their noise is there, as in `naive`."""
    sampler, batch = replace(work.sampler, exact=exact), len(work.cond)
    runner = GraphRunner(sampler, graphs_of(sampler.device), batch + 1)
    numbers = tuple(range(batch))
    keys = [NoiseKey(SEED, number) for number in numbers]
    runner.put(numbers, [chosen] * batch, ClassCondition(work.cond.labels_B), keys)

    def make() -> Made:
        for index, segment in enumerate(chosen.segments):
            stepwise = segment.actor == "teacher"
            for _ in range(segment.stop - segment.start if stepwise else 1):
                runner.advance(numbers, [index] * batch, batch, batch if stepwise else None)
        pixels, _ = runner.decode(numbers)
        return Made(runner.slots.x_NLC[runner.slots.index(numbers)], pixels)

    return make


def with_teacher(work: Work, size: Size, arithmetic: str) -> Work:
    """The same with a teacher of the student's size, prepared, and guidance."""
    torch.manual_seed(SEED + 1)
    sampler, device = work.sampler, work.sampler.device
    teacher = new_teacher(size.student, new_tokenizer(size.vq)).to(device).eval().requires_grad_(False)
    prepared = prepare_teacher(teacher, sampler.tokenizer, choose(arithmetic, device))
    guided = replace(sampler.draw, guidance=2.0)
    return replace(work, sampler=replace(sampler, teacher=prepared, draw=guided))


def measure(
    name: str, batch: int, repeats: int, device: torch.device, arithmetic: str, teacher: bool
) -> dict[str, Any]:
    """A row of the results.

    Raises:
        BenchmarkError: a lane makes other images than its rounding explains.
    """
    work = prepare(ALL[name], batch, device)
    low = in_arithmetic(work, arithmetic)
    blocks = low.sampler.layout.num_blocks
    one = plan.one_step(blocks, low.split)
    lanes: dict[str, Callable[[], Made]] = {"naive": partial(naive, work), "eager": partial(ours, low)}
    lanes |= {lane: on_runner(low, lane == "exact", one) for lane in ("exact", "fast")}
    expected, near = ours(work), {}  # by the reference models
    for lane, make in list(lanes.items()):
        try:
            near[lane] = agreement(make(), expected, work.sampler.codebook_VC)
        except torch.OutOfMemoryError:
            if lane != "naive":
                raise
            del lanes[lane]  # its differences take tens of gigabytes at large batches; the others go on
            torch.cuda.empty_cache()
            continue
        check(near[lane], "exact32" if lane == "naive" else arithmetic, f"{name}, {lane}")
    if teacher:
        lanes["teacher"] = on_runner(with_teacher(low, ALL[name], arithmetic), False, plan.teacher(blocks))
        lanes["teacher"]()
    seconds = in_turn(lanes, repeats)
    fast = seconds["fast"]
    return {
        "model": name,
        "batch": batch,
        "arithmetic": arithmetic,
        "seconds": seconds,
        "ms": {lane: 1e3 * report.median(times) for lane, times in seconds.items()},
        "images_per_s": {lane: batch / report.median(seconds[lane]) for lane in ("exact", "fast")},
        "agreement": {lane: found.row() for lane, found in near.items()},
        "naive_over_fast": report.paired_ratio(seconds["naive"], fast) if "naive" in seconds else None,
        "exact_share": report.paired_ratio(fast, seconds["exact"]),
        "teacher_over_fast": report.paired_ratio(seconds["teacher"], fast) if teacher else None,
    }


def exact_is_default(rows: Sequence[Mapping[str, Any]]) -> bool | None:
    """The rule, for a GPU's default: at the largest batch of each model. None of no rows."""
    largest = max((row["batch"] for row in rows), default=0)
    shares = [row["exact_share"] for row in rows if row["batch"] == largest]
    return min(shares) >= LEAST_SHARE if shares else None


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        [
            row["model"],
            row["batch"],
            row["arithmetic"],
            *(report.number(row["ms"].get(lane)) for lane in LANES),
            *(report.number(row["images_per_s"][lane], ".0f") for lane in ("exact", "fast")),
            report.number(row["naive_over_fast"]),
            report.number(row["exact_share"], ".0%"),
            report.number(row["teacher_over_fast"], ".1f"),
            report.number(row["agreement"]["fast"]["tokens"], ".1%"),
            report.number(row["agreement"]["fast"]["psnr_db"], ".1f"),
        ]
        for row in results.get("rows", [])
    ]
    columns = [
        "model", "batch", "arithmetic", *(f"{lane}, ms" for lane in LANES),
        "exact, images/s", "fast, images/s", "naive ÷ fast", "exact ÷ fast, speed", "teacher ÷ fast",
        "equal tokens", "PSNR, dB",
    ]  # fmt: skip
    rule = {True: "yes", False: "no", None: "unknown"}[exact_is_default(results.get("rows", []))]
    return "\n\n".join(
        [
            "One step from noise to pixels on the CPU, random weights; naive in float32 (– no memory):",
            report.markdown_table(columns, rows),
            f"Exact at {LEAST_SHARE:.0%} of fast or more at the largest batch, a GPU's default: {rule}.",
        ]
    )


def run(arguments: argparse.Namespace) -> bool:
    """Measure and file; False if something failed on the way.

    Raises:
        DDError: no such device, model or arithmetic.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    identity = identity_of(arguments.models)
    device = pick_device(arguments.device)
    settle(device)
    for name in arguments.arithmetic:
        choose(name, device)
    config = report.configuration(device, torch.get_num_threads(), identity, report.own_options(arguments))
    with report.filed(THEME, config, table, arguments.out) as results:
        results["rows"] = []
        asked = itertools.product(arguments.models, arguments.batches, arguments.arithmetic)
        for name, batch, arithmetic in asked:
            print(f"{name}, batch {batch}, {arithmetic}", flush=True)
            with_its_teacher = arguments.teacher and batch == arguments.batches[0]
            try:
                row = measure(name, batch, arguments.repeats, device, arithmetic, with_its_teacher)
                results["rows"].append(row)
            except (report.BenchmarkError, RuntimeError) as error:  # the others go on
                results["failures"].append(f"{name}, batch {batch}: {report.describe(error)}")
    return not results["failures"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    about = "One step by graphs: exact and fast, against eager and naive."
    parser = report.parser("benchmarks.graphs", about, bundle=False)
    parser.add_argument("--models", type=report.names, default=list(SIZES), help=f"of {', '.join(ALL)}")
    parser.add_argument("--batches", type=report.whole_numbers, default=[1, 64], help="such as 1,64")
    parser.add_argument("--repeats", type=report.positive, default=10, help="of each lane")
    parser.add_argument("--arithmetic", type=report.names, default=["bf16"], help="such as exact32,bf16,fp16")
    parser.add_argument("--teacher", action="store_true", help="its time too, at the first batch size")
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
