"""The dearest kernels of one step, by PyTorch's profiler: what a pass spends its time on, by name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.naive import ALL, SIZES, SMOKE, identity_of, in_arithmetic, ours, prepare
from dd_core.engine.arithmetic import choose
from dd_core.engine.cuda import settle
from dd_core.runtime import pick_device

THEME = "kernels"
_SHOWN = 25
_SMOKE = ("--models", ",".join(SMOKE), "--batches", "2")


def dearest(name: str, batch: int, device: torch.device, arithmetic: str) -> list[dict[str, Any]]:
    """Rows of the kernels (on a CPU: operations) of one pass, the dearest first, and their share of it."""
    work = in_arithmetic(prepare(ALL[name], batch, device), arithmetic)
    cuda = device.type == "cuda"
    ours(work)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        ours(work)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, field))
    whole = sum(getattr(event, field) for event in events) or 1.0
    return [
        {
            "model": name,
            "batch": batch,
            "kernel": event.key[:90],
            "calls": event.count,
            "ms": getattr(event, field) / 1e3,
            "share": getattr(event, field) / whole,
        }
        for event in events[:_SHOWN]
    ]


_ROWS = {
    "model": "{model}",
    "batch": "{batch}",
    "kernel": "{kernel}",
    "calls": "{calls}",
    "ms": "{ms:.3f}",
    "share": "{share:.1%}",
}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    return report.table(_ROWS, results.get("rows", []))


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
    choose(arguments.arithmetic, device)
    config = report.configuration(device, torch.get_num_threads(), identity, report.own_options(arguments))
    with report.filed(THEME, config, table, arguments.out) as results:
        results["rows"] = []
        for name in arguments.models:
            for batch in arguments.batches:
                results["rows"] += dearest(name, batch, device, arguments.arithmetic)
    return not results["failures"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.kernels", "The dearest kernels of one step.", bundle=False)
    parser.add_argument("--models", type=report.names, default=list(SIZES), help=f"of {', '.join(ALL)}")
    parser.add_argument("--batches", type=report.whole_numbers, default=[1, 64], help="such as 1,64")
    parser.add_argument("--arithmetic", default="bf16", help="such as exact32")
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
