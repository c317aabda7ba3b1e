"""Our one-step path against a naive one, on the same random weights: time and peak memory.

    for each device, size and batch: warm up → repeats × (both, in turn) → ratios; then the peaks

The baseline does what the released sampling scripts do, written anew: it searches the nearest code of
every input token through all differences (a tensor of V×B×L×C), at data positions it puts a row of
−∞ with one zero in place of the logits, and asks the tokenizer for its codebook each time. It runs the
reference models in float32, ours the same models prepared in an arithmetic. Both are given their noise.

Shapes: B batch, L tokens, C code dimension, V codebook size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.agreement import LEAST, Made, agreement, check
from benchmarks.processes import run_module
from dd_core import plan
from dd_core.condition import ClassCondition
from dd_core.engine.arithmetic import choose
from dd_core.engine.cuda import settle
from dd_core.engine.memory import return_freed
from dd_core.engine.prepared import prepare as prepared
from dd_core.errors import InvalidRequestError
from dd_core.layout import data_positions
from dd_core.models.build import new_student, new_tokenizer
from dd_core.models.config import LlamaGenConfig, ModelConfig, MultiScaleConfig, VARConfig, VQConfig
from dd_core.noise import batch_noise
from dd_core.runtime import pick_device
from dd_core.sampling import Sampler, run_plan, to_pixels

THEME = "naive"
SEED = 0


@dataclass(frozen=True)
class Size:
    """An architecture; `split` is the first block whose tokens stay continuous, as published."""

    vq: MultiScaleConfig | VQConfig
    student: ModelConfig
    split: int


SIZES = {
    "VAR-DD-d16": Size(MultiScaleConfig(), VARConfig.of_depth(16), 5),
    "LlamaGen-DD-L": Size(VQConfig(), LlamaGenConfig(24, 16, 1024), 130),
}
# As small as it gets: shows that the benchmark works, and nothing of the machine.
SMOKE = {
    "VAR-DD-smoke": Size(
        MultiScaleConfig(64, 8, 32, (1, 1), 1, (1, 2, 3, 4)), VARConfig(2, 32, 2, 64, 8, (1, 2, 3, 4), 10), 2
    ),
    "LlamaGen-DD-smoke": Size(VQConfig(64, 8, 32, 32, (1, 1), 1), LlamaGenConfig(2, 2, 32, 64, 8, 4, 10), 5),
}
ALL = SIZES | SMOKE
_SMOKE = ("--models", ",".join(SMOKE), "--batches", "2", "--repeats", "2")


@dataclass(frozen=True)
class Work:
    """A model and what it is asked for: everything that a variant is given."""

    sampler: Sampler
    split: int
    cond: ClassCondition
    noise_BLC: Tensor
    uniform_BL: Tensor


def prepare(size: Size, batch: int, device: torch.device) -> Work:
    """Random weights and noise, the same in every process."""
    torch.manual_seed(SEED)
    tokenizer, student = new_tokenizer(size.vq), new_student(size.student)
    for model in (tokenizer, student):
        model.to(device).eval().requires_grad_(False)
    # Both decode the whole batch at once; that images do not depend on it is measured by the engine.
    sampler = Sampler(student.layout, tokenizer, student, device=device, exact=False)
    keys = [(SEED, index) for index in range(batch)]
    noise, uniform = batch_noise(keys, student.layout, sampler.codebook_VC.shape[1])
    cond = ClassCondition(torch.arange(batch) % size.student.num_classes)
    return Work(sampler, size.split, cond.to(device), noise.to(device), uniform.to(device))


def in_arithmetic(work: Work, name: str) -> Work:
    """The same on models prepared in an arithmetic; the reference models are freed with `work`.

    Raises:
        InvalidRequestError: no such arithmetic, or not in the device's hardware.
    """
    return replace(work, sampler=prepared(work.sampler, choose(name, work.sampler.device)))


@torch.inference_mode()
def ours(work: Work) -> Made:
    """The plan `dd-1` as the engine runs it."""
    chosen = plan.one_step(work.sampler.layout.num_blocks, work.split)
    codes = run_plan(work.sampler, chosen, work.cond, work.noise_BLC, work.uniform_BL)
    return Made(codes, to_pixels(work.sampler.tokenizer.to_image(codes)).cpu())


@torch.inference_mode()
def naive(work: Work) -> Made:
    """The released scripts' way from noise to pixels, convolutions by PyTorch's own precision."""
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True)
    with flags:
        return _naive(work)


def _naive(work: Work) -> Made:
    student, tokenizer, x_BLC = work.sampler.student, work.sampler.tokenizer, work.noise_BLC
    assert student is not None
    step_B = torch.zeros(len(x_BLC), dtype=torch.long, device=x_BLC.device)
    embeddings, logits = student.predict(x_BLC, work.cond, step_B)
    differences_VBLC = tokenizer.codebook_VC[:, None, None] - x_BLC
    indices_BL = (differences_VBLC**2).sum(-1).argmin(0)
    known = torch.full_like(logits, -math.inf).scatter_(-1, indices_BL[..., None], 0.0)
    is_data = data_positions(student.block_L, step_B)[..., None]
    logits, embeddings = torch.where(is_data, known, logits), torch.where(is_data, x_BLC, embeddings)
    first = student.layout.starts[work.split]
    codes = torch.cat([tokenizer.codebook_VC[logits[:, :first].argmax(-1)], embeddings[:, first:]], 1)
    return Made(codes, to_pixels(tokenizer.to_image(codes)).cpu())


def identity_of(models: Sequence[str]) -> dict[str, str]:
    """What a result says of the weights of models, by their names in `ALL`.

    Raises:
        InvalidRequestError: there is no such model.
    """
    unknown = [name for name in models if name not in ALL]
    if unknown:
        raise InvalidRequestError(f"no model {unknown[0]!r}; there are {', '.join(ALL)}", param="models")
    return report.random_weights(*(ALL[name] for name in models), SEED)


NAIVE = "naive"
Variants = Mapping[str, Callable[[], Made]]


def variant(work: Work, name: str) -> Callable[[], Made]:
    """`naive`, or ours in an arithmetic by its name."""
    return partial(naive, work) if name == NAIVE else partial(ours, in_arithmetic(work, name))


def measure_seconds(runs: Variants, repeats: int, codebook_VC: Tensor) -> dict[str, dict[str, Any]]:
    """All variants in turn, `repeats` times after one that does not count: seconds, and agreement with the
    baseline.

    Raises:
        BenchmarkError: one makes other images than its rounding explains.
    """
    first = {name: run() for name, run in runs.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for name in runs.keys() - {NAIVE}:
        near = agreement(first[name], first[NAIVE], codebook_VC)
        check(near, name, "naive and ours make")
        found[name]["agreement"] = near.row()
    for name, times in in_turn(runs, repeats).items():
        found[name]["seconds"] = times
    return found


def in_turn(runs: Variants, repeats: int) -> dict[str, list[float]]:
    """Seconds of all variants, each `repeats` times; a round begins with another than the one before it."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            runs[name]()  # ends with a copy to the CPU: it has waited
            seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_on_cuda(run: Callable[[], Made], device: torch.device) -> dict[str, int]:
    """Bytes that torch had allocated at most, and before the call (weights and inputs)."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return {"before": before, "peak": torch.cuda.max_memory_allocated(device)}


def peak_on_cpu(name: str, batch: int, which: str, threads: int) -> dict[str, int]:
    """The same of the resident memory of a process that does nothing else.

    Raises:
        BenchmarkError: the process failed.
    """
    arguments = ("--threads", str(threads), "--peak-of", name, str(batch), which)
    printed = run_module("benchmarks.naive", *arguments, about=f"{name}, batch {batch}, {which}")
    found: dict[str, int] = json.loads(printed)
    return found


def _report_peak(name: str, batch: int, which: str) -> None:
    """The process of `peak_on_cpu`: what it took to make the weights is not of the call."""
    run = variant(prepare(ALL[name], batch, torch.device("cpu")), which)
    return_freed()
    report.reset_resident_peak()
    before = report.resident_peak()
    run()
    print(json.dumps({"before": before, "peak": report.resident_peak()}))


def measure(
    name: str, batch: int, repeats: int, device: torch.device, arithmetics: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of the results, one an arithmetic.

    Raises:
        BenchmarkError: the numbers cannot be trusted, or a process failed.
        RuntimeError: out of memory, most likely.
    """
    cpu, names = device.type == "cpu", [NAIVE, *arithmetics]
    # Before this process holds a model, too.
    peaks = {v: peak_on_cpu(name, batch, v, torch.get_num_threads()) for v in names if cpu}
    work = prepare(ALL[name], batch, device)
    runs = {v: variant(work, v) for v in names}
    found = measure_seconds(runs, repeats, work.sampler.codebook_VC)
    del work, runs  # or each would count the others' weights
    peaks |= {
        v: peak_on_cuda(variant(prepare(ALL[name], batch, device), v), device) for v in names if not cpu
    }
    more = {v: peaks[v]["peak"] - peaks[v]["before"] for v in names}
    base = found[NAIVE]["seconds"]
    return [
        {
            "model": name,
            "batch": batch,
            "arithmetic": v,
            "seconds": {"ours": found[v]["seconds"], NAIVE: base},
            "agreement": found[v]["agreement"],
            "peak_bytes": {"ours": peaks[v]["peak"], NAIVE: peaks[NAIVE]["peak"]},
            # What the call itself takes, beyond weights, inputs and libraries.
            "working_bytes": {"ours": more[v], NAIVE: more[NAIVE]},
            "time_ratio": report.paired_ratio(base, found[v]["seconds"]),
            "peak_ratio": peaks[NAIVE]["peak"] / peaks[v]["peak"],
            "working_ratio": more[NAIVE] / more[v] if more[v] > 0 else None,
        }
        for v in arithmetics
    ]


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    sides = ("ours", NAIVE)
    rows = [
        [
            row["model"],
            row["batch"],
            row["arithmetic"],
            *(report.number(1e3 * report.median(row["seconds"][v]), ".1f") for v in sides),
            report.number(row["time_ratio"]),
            *(report.mib(row["peak_bytes"][v]) for v in sides),
            report.number(row["peak_ratio"]),
            *(report.mib(row["working_bytes"][v]) for v in sides),
            report.number(row["working_ratio"]),
            report.number(row["agreement"]["tokens"], ".1%"),
            report.number(row["agreement"]["psnr_db"], ".1f") or "all equal",
        ]
        for row in results.get("rows", [])
    ]
    columns = [
        "model", "batch", "arithmetic", "ours, ms", "naive, ms", "naive ÷ ours",
        "ours, peak MiB", "naive, peak MiB", "naive ÷ ours",
        "ours, beyond weights MiB", "naive, beyond weights MiB", "naive ÷ ours", "equal tokens", "PSNR, dB",
    ]  # fmt: skip
    about = (
        "One step from noise to pixels, random weights, the whole batch decoded at once; naive in float32:"
    )
    return f"{about}\n\n{report.markdown_table(columns, rows)}"


def devices_of(name: str) -> list[torch.device]:
    """`auto`: the CPU, and CUDA where there is one.

    Raises:
        InvalidRequestError: no such device on this machine.
    """
    if name != "auto":
        return [pick_device(name)]
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def run(arguments: argparse.Namespace) -> bool:
    """Measure and file, a record for each device; False if something failed on the way.

    Raises:
        DDError: no such device or model, or numbers that cannot be trusted.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        name, batch, which = arguments.peak_of
        _report_peak(name, int(batch), which)
        return True
    chosen, batches, repeats = arguments.models, arguments.batches, arguments.repeats
    identity = identity_of(chosen)
    for device, name in itertools.product(devices_of(arguments.device), arguments.arithmetic):
        choose(name, device)
    options = {name: getattr(arguments, name) for name in ("models", "batches", "repeats", "arithmetic")}
    good = True
    for device in devices_of(arguments.device):
        settle(device)
        config = report.configuration(device, torch.get_num_threads(), identity, options)
        with report.filed(THEME, config, table, arguments.out) as results:
            results["rows"] = []
            for name, batch in itertools.product(chosen, batches):
                print(f"{device}: {name}, batch {batch}", flush=True)
                try:
                    results["rows"] += measure(name, batch, repeats, device, arguments.arithmetic)
                except (report.BenchmarkError, RuntimeError) as error:  # the others go on
                    results["failures"].append(f"{name}, batch {batch}: {report.describe(error)}")
            good = good and not results["failures"]
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    about = "Our one-step path against a naive one. With --device auto on both CPU and CUDA."
    parser = report.parser("benchmarks.naive", about, bundle=False)
    about = f"of {', '.join(ALL)}"
    parser.add_argument("--models", type=report.names, default=list(SIZES), help=about)
    parser.add_argument("--batches", type=report.whole_numbers, default=[1, 8], help="such as 1,8")
    parser.add_argument("--repeats", type=report.positive, default=5, help="of each variant")
    about = f"of ours: {', '.join(LEAST)}"
    parser.add_argument("--arithmetic", type=report.names, default=["exact32"], help=about)
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
