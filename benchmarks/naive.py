"""Our one-step path against a naive one, on the same random weights: time and peak memory.

    for each device, size and batch: warm up → repeats × (both, in turn) → ratios; then the peaks

The baseline does what the released sampling scripts do, written anew: it searches the nearest code of
every input token through all differences (a tensor of V×B×L×C), at data positions it puts a row of
−∞ with one zero in place of the logits, and asks the tokenizer for its codebook each time. The
network, its float32 weights, the decoder and the images are the same: what differs is the rest.

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.processes import run_module
from dd_core import plan
from dd_core.condition import ClassCondition
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
    """A model and what it is asked for: everything that both variants are given."""

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


@torch.inference_mode()
def ours(work: Work) -> Tensor:
    """The plan `dd-1` as the engine runs it → pixels."""
    chosen = plan.one_step(work.sampler.layout.num_blocks, work.split)
    codes = run_plan(work.sampler, chosen, work.cond, work.noise_BLC, work.uniform_BL)
    return to_pixels(work.sampler.tokenizer.to_image(codes)).cpu()


@torch.inference_mode()
def naive(work: Work) -> Tensor:
    """The released scripts' way from noise to pixels."""
    student, tokenizer, x_BLC = work.sampler.student, work.sampler.tokenizer, work.noise_BLC
    assert student is not None
    step_B = torch.zeros(len(x_BLC), dtype=torch.long, device=x_BLC.device)
    embeddings, logits = student.predict(x_BLC, work.cond, step_B)
    differences_VBLC = tokenizer.codebook_VC[:, None, None] - x_BLC
    indices_BL = (differences_VBLC**2).sum(-1).argmin(0)
    known = torch.full_like(logits, -math.inf).scatter_(-1, indices_BL[..., None], 0.0)
    is_data = data_positions(student.layout, step_B)[..., None]
    logits, embeddings = torch.where(is_data, known, logits), torch.where(is_data, x_BLC, embeddings)
    first = student.layout.starts[work.split]
    codes = torch.cat([tokenizer.codebook_VC[logits[:, :first].argmax(-1)], embeddings[:, first:]], 1)
    return to_pixels(tokenizer.to_image(codes)).cpu()


VARIANTS: dict[str, Callable[[Work], Tensor]] = {"ours": ours, "naive": naive}


def measure_seconds(work: Work, repeats: int) -> dict[str, list[float]]:
    """Both variants in turn, `repeats` times after one that does not count.

    Raises:
        BenchmarkError: they do not make the same images.
    """
    pixels = {name: run(work).int() for name, run in VARIANTS.items()}
    if int((pixels["ours"] - pixels["naive"]).abs().max()) > 1:
        raise report.BenchmarkError("the naive path makes other images: it is no baseline")
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats):
        names = list(VARIANTS) if repeat % 2 else list(VARIANTS)[::-1]
        for name in names:
            started = time.perf_counter()
            VARIANTS[name](work)  # ends with a copy to the CPU: it has waited
            seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_on_cuda(work: Work, variant: str) -> dict[str, int]:
    """Bytes that torch had allocated at most, and before the call (weights and inputs)."""
    torch.cuda.synchronize(work.sampler.device)
    torch.cuda.reset_peak_memory_stats(work.sampler.device)
    before = torch.cuda.memory_allocated(work.sampler.device)
    VARIANTS[variant](work)
    return {"before": before, "peak": torch.cuda.max_memory_allocated(work.sampler.device)}


def peak_on_cpu(name: str, batch: int, variant: str, threads: int) -> dict[str, int]:
    """The same of the resident memory of a process that does nothing else.

    Raises:
        BenchmarkError: the process failed.
    """
    arguments = ("--threads", str(threads), "--peak-of", name, str(batch), variant)
    printed = run_module("benchmarks.naive", *arguments, about=f"{name}, batch {batch}, {variant}")
    found: dict[str, int] = json.loads(printed)
    return found


def _report_peak(name: str, batch: int, variant: str) -> None:
    """The process of `peak_on_cpu`."""
    work = prepare(ALL[name], batch, torch.device("cpu"))
    before = report.resident_peak()
    VARIANTS[variant](work)
    print(json.dumps({"before": before, "peak": report.resident_peak()}))


def measure(name: str, batch: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """One row of the results.

    Raises:
        BenchmarkError: the numbers cannot be trusted, or a process failed.
        RuntimeError: out of memory, most likely.
    """
    cpu = device.type == "cpu"
    # Before this process holds a model, too.
    peaks = {v: peak_on_cpu(name, batch, v, torch.get_num_threads()) for v in VARIANTS if cpu}
    work = prepare(ALL[name], batch, device)
    seconds = measure_seconds(work, repeats)
    peaks |= {v: peak_on_cuda(work, v) for v in VARIANTS if not cpu}
    more = {variant: peaks[variant]["peak"] - peaks[variant]["before"] for variant in VARIANTS}
    return {
        "model": name,
        "batch": batch,
        "seconds": seconds,
        "peak_bytes": {variant: peaks[variant]["peak"] for variant in VARIANTS},
        # What the call itself takes, beyond weights, inputs and libraries.
        "working_bytes": more,
        "time_ratio": report.paired_ratio(seconds["naive"], seconds["ours"]),
        "peak_ratio": peaks["naive"]["peak"] / peaks["ours"]["peak"],
        "working_ratio": more["naive"] / more["ours"] if more["ours"] > 0 else None,
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        [
            row["model"],
            row["batch"],
            *(report.number(1e3 * report.median(row["seconds"][v]), ".1f") for v in VARIANTS),
            report.number(row["time_ratio"]),
            *(report.mib(row["peak_bytes"][v]) for v in VARIANTS),
            report.number(row["peak_ratio"]),
            *(report.mib(row["working_bytes"][v]) for v in VARIANTS),
            report.number(row["working_ratio"]),
        ]
        for row in results.get("rows", [])
    ]
    columns = [
        "model", "batch", "ours, ms", "naive, ms", "naive ÷ ours",
        "ours, peak MiB", "naive, peak MiB", "naive ÷ ours",
        "ours, beyond weights MiB", "naive, beyond weights MiB", "naive ÷ ours",
    ]  # fmt: skip
    about = "One step from noise to pixels, float32, random weights, the whole batch decoded at once:"
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
        name, batch, variant = arguments.peak_of
        _report_peak(name, int(batch), variant)
        return True
    chosen, batches, repeats = arguments.models, arguments.batches, arguments.repeats
    unknown = [name for name in chosen if name not in ALL]
    if unknown:
        raise InvalidRequestError(f"no model {unknown[0]!r}; there are {', '.join(ALL)}", param="models")
    identity = report.random_weights(*(ALL[name] for name in chosen), SEED)
    options = {"models": chosen, "batches": batches, "repeats": repeats}
    good = True
    for device in devices_of(arguments.device):
        config = report.configuration(device, torch.get_num_threads(), identity, options)
        with report.filed(THEME, config, table, arguments.out) as results:
            results["rows"] = []
            for name, batch in itertools.product(chosen, batches):
                print(f"{device}: {name}, batch {batch}", flush=True)
                try:
                    results["rows"].append(measure(name, batch, repeats, device))
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
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
