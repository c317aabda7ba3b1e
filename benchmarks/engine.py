"""The engine alone: how long a plan takes, without HTTP, queue or encoding.

    for each batch size: warm up → repeats × (every lane once, then the stages once) → medians, ratios

A lane is a plan on a sampler in an arithmetic. Lanes are interleaved and their order rotates, so that a
machine which gets slower in the middle slows all of them; ratios are medians of those within a repeat. How
near the images of one arithmetic are to the first one's is a table of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, starmap
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.agreement import agreement, condition_of, make
from dd_core.bundle import Bundle, load_bundle
from dd_core.condition import Condition
from dd_core.engine.arithmetic import NAMES, choose
from dd_core.engine.clock import mark, seconds_between, wait_for
from dd_core.engine.cuda import settle
from dd_core.errors import InvalidRequestError
from dd_core.noise import batch_noise
from dd_core.plan import Plan, Preset
from dd_core.runtime import pick_device
from dd_core.sampling import Sampler, run_plan, sample_images, to_pixels

THEME = "engine"
STAGES = ("noise", "plan", "decode", "to_uint8")
Keys = list[tuple[int, int]]
_SMOKE = ("--batches", "1,2", "--repeats", "2", "--compare", "2")


@dataclass(frozen=True)
class Lane:
    """A subject of the timing: a plan of the bundle, with images exact in any batch or not.

    Args:
        mark: of the arithmetic, where there are several.
    """

    plan: Plan
    offered: bool
    sampler: Sampler
    mark: str = ""

    @property
    def name(self) -> str:
        """The plan's name, marked when it is not exact, and by its arithmetic."""
        marks = [self.mark] * bool(self.mark) + ["not exact"] * (not self.sampler.exact)
        return f"{self.plan.name} ({', '.join(marks)})" if marks else self.plan.name


def lanes_of(bundle: Bundle, chosen: Sequence[str] | None = None, mark: str = "") -> list[Lane]:
    """Every plan as it is served; the 1-step plan and the teacher also without exactness.

    Raises:
        InvalidRequestError: a chosen plan that the bundle does not have.
    """
    names = [preset.plan.name for preset in bundle.presets]
    unknown = [name for name in chosen or () if name not in names]
    if unknown:
        raise InvalidRequestError(f"no plan {unknown[0]!r}; there are {', '.join(names)}", param="plans")
    presets = [p for p in bundle.presets if not chosen or p.plan.name in chosen]
    presets.sort(key=lambda p: (not p.offered, p.plan.cost))
    exact, inexact = replace(bundle.sampler, exact=True), replace(bundle.sampler, exact=False)
    both = {quickest(presets).name, teacher_name(presets)}
    lanes = [Lane(p.plan, p.offered, exact, mark) for p in presets]
    return lanes + [Lane(p.plan, p.offered, inexact, mark) for p in presets if p.plan.name in both]


def quickest(presets: Sequence[Preset]) -> Plan:
    """The 1-step plan: the cheapest that is offered."""
    return min(presets, key=lambda p: (not p.offered, p.plan.cost)).plan


def teacher_name(presets: Sequence[Preset]) -> str | None:
    """The plan that ratios are taken to: the teacher alone, from the first block to the last.

    Rather with draws of its own than by the map of the noise, which the solver makes dearer.
    """
    alone = [p.plan for p in presets if len(p.plan.segments) == 1 and p.plan.needs == {"teacher"}]
    alone.sort(key=lambda plan: plan.draw != "multinomial")
    return alone[0].name if alone else None


def time_lane(lane: Lane, cond: Condition, keys: Keys) -> float:
    """Seconds of one whole call: from conditions and seeds to pixels on the CPU."""
    wait_for(lane.sampler.device)
    started = time.perf_counter()
    sample_images(lane.sampler, lane.plan, cond, keys)  # ends with a copy to the CPU: it has waited
    return time.perf_counter() - started


@torch.inference_mode()
def run_stages(
    sampler: Sampler, plan: Plan, condition: Condition, keys: Keys
) -> tuple[Tensor, dict[str, float]]:
    """`sample_images` in its parts: the same images, and the seconds of each of `STAGES`.

    `noise` holds the copy to the device and `to_uint8` the copy back.
    """
    device = sampler.device
    wait_for(device)
    marks = [mark(device)]
    noise, uniform = batch_noise(keys, sampler.layout, sampler.codebook_VC.shape[1])
    cond = condition.to(device)
    noise, uniform = (t.to(device, non_blocking=True) for t in (noise, uniform))
    marks.append(mark(device))
    codes = run_plan(sampler, plan, cond, noise, uniform)
    marks.append(mark(device))
    image = sampler.to_images(codes)
    marks.append(mark(device))
    pixels = to_pixels(image).cpu()
    marks.append(mark(device))
    wait_for(device)
    return pixels, dict(zip(STAGES, starmap(seconds_between, pairwise(marks)), strict=True))


@dataclass
class Samples:
    """Seconds of every repeat at one batch size."""

    lanes: dict[str, list[float]]
    stages: dict[str, list[float]]
    errors: dict[str, str]


def measure(lanes: Sequence[Lane], conditions: Mapping[str, Condition], batch: int, repeats: int) -> Samples:
    """Times all lanes, interleaved; one that fails is noted and left out from there on.

    Args:
        conditions: of the batch, by the lanes' marks.

    Raises:
        BenchmarkError: the stages do not make the images that `sample_images` makes.
    """
    samples = Samples({lane.name: [] for lane in lanes}, {name: [] for name in STAGES}, {})
    alive = list(lanes)
    for repeat in range(-1, repeats):  # the first is the warm-up
        keys = [(repeat + 1, index) for index in range(batch)]
        turn = repeat % max(1, len(alive))
        for lane in alive[turn:] + alive[:turn]:
            try:
                seconds = time_lane(lane, conditions[lane.mark], keys)
            except RuntimeError as error:  # out of memory, most likely: the others go on
                samples.errors[lane.name] = report.describe(error)
                alive.remove(lane)
                continue
            if repeat >= 0:
                samples.lanes[lane.name].append(seconds)
        if lanes[0] in alive:
            _measure_stages(lanes[0], conditions[lanes[0].mark], keys, samples, keep=repeat >= 0)
    return samples


def _measure_stages(lane: Lane, cond: Condition, keys: Keys, samples: Samples, keep: bool) -> None:
    pixels, seconds = run_stages(lane.sampler, lane.plan, cond, keys)
    if keep:
        for name in STAGES:
            samples.stages[name].append(seconds[name])
    elif not torch.equal(pixels, sample_images(lane.sampler, lane.plan, cond, keys)):
        raise report.BenchmarkError("the stages make other images than sample_images: bring them in line")


def summarise(
    lanes: Sequence[Lane], samples: Samples, batch: int, teacher: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Rows of one batch size, from its own samples alone: `plans`, `ratios`, `exactness`, `stages`."""
    exactness = []
    for lane in lanes:
        served = replace(lane, sampler=replace(lane.sampler, exact=True)).name
        exact, inexact = samples.lanes.get(served, []), samples.lanes[lane.name]
        if not lane.sampler.exact and exact and len(exact) == len(inexact):
            ratio = report.paired_ratio(exact, inexact)
            exactness.append({"batch": batch, "plan": served, "exact_over_not_exact": ratio})
    rows = [_plan_row(lane, samples, batch, _of_teacher(lanes, lane, teacher)) for lane in lanes]
    return {
        "plans": rows,
        "ratios": _ratio_rows(rows, batch),
        "exactness": exactness,
        "stages": _stage_rows(lanes[0].name, samples, batch),
    }


def _of_teacher(lanes: Sequence[Lane], lane: Lane, teacher: str | None) -> str | None:
    """The name of the teacher's lane in the arithmetic of `lane`, as it is served."""
    found = [x for x in lanes if x.plan.name == teacher and x.mark == lane.mark and x.sampler.exact]
    return found[0].name if found else None


def _plan_row(lane: Lane, samples: Samples, batch: int, teacher: str | None) -> dict[str, Any]:
    seconds, error = samples.lanes[lane.name], samples.errors.get(lane.name)
    reference = samples.lanes.get(teacher, []) if teacher else []
    good, paired = error is None and bool(seconds), len(reference) == len(seconds)
    return {
        "batch": batch,
        "plan": lane.name,
        "arithmetic": lane.mark,
        "passes": lane.plan.cost,
        "student": lane.plan.needs == {"student"},
        "offered": lane.offered,
        "exact": lane.sampler.exact,
        "error": error,
        "seconds": seconds,
        "median_ms": 1e3 * report.median(seconds) if good else None,
        "p95_ms": 1e3 * report.percentile(seconds, 95) if good else None,
        "images_per_s": batch / report.median(seconds) if good else None,
        "speed_up": report.paired_ratio(reference, seconds) if good and paired else None,
    }


def _ratio_rows(plans: Sequence[Mapping[str, Any]], batch: int) -> list[dict[str, Any]]:
    """The ratios of the paper's Table 1: teacher ÷ one step and teacher ÷ two steps, by arithmetic."""
    rows: dict[str, dict[str, Any]] = {}
    for row in plans:
        if row["student"] and row["exact"] and row["passes"] in (1, 2) and row["speed_up"] is not None:
            found = rows.setdefault(row["arithmetic"], {"batch": batch, "arithmetic": row["arithmetic"]})
            found.setdefault({1: "one_step", 2: "two_steps"}[row["passes"]], row["speed_up"])
    return [row for row in rows.values() if {"one_step", "two_steps"} <= row.keys()]


def _stage_rows(plan: str, samples: Samples, batch: int) -> list[dict[str, Any]]:
    if plan in samples.errors or not all(samples.stages.values()):
        return []
    middle = {name: report.median(samples.stages[name]) for name in STAGES}
    total = sum(middle.values())
    row = {
        "batch": batch,
        "plan": plan,
        "median_ms": {name: 1e3 * middle[name] for name in STAGES},
        "share": {name: middle[name] / total for name in STAGES},
        # Near 1, or the stages are not what the call spends its time on.
        "sum_over_whole_call": total / report.median(samples.lanes[plan]),
    }
    return [row]


def compare(bundles: Mapping[str, Bundle], plans: Sequence[Plan], images: int) -> list[dict[str, Any]]:
    """How near the images of each arithmetic are to the first one's, plan by plan; by threes of a condition.

    Tokens that are drawn after another than before differ freely, so of a teacher's plans the share says
    where the first difference was, not how large.
    """
    first, *others = bundles
    base, keys = bundles[first], [(index, 0) for index in range(images)]
    conditions = {name: condition_of(bundle, images, each=3) for name, bundle in bundles.items()}
    rows = []
    for chosen in plans:
        expected = make(base.sampler, chosen, conditions[first], list(keys))
        for name in others:
            found = make(bundles[name].sampler, chosen, conditions[name], list(keys))
            near = agreement(found, expected, base.sampler.codebook_VC)
            rows.append({"plan": chosen.name, "arithmetic": name, "images": images, **near.row()})
    return rows


_PLANS = {
    "batch": "{batch}",
    "plan": "{plan}{mark}",
    "passes": "{passes}",
    "median ms": "{median_ms:.2f}",
    "p95 ms": "{p95_ms:.2f}",
    "images/s": "{images_per_s:.1f}",
    "speed-up over the teacher": "{shown}",
}
_EXACTNESS = {
    "batch": "{batch}",
    "plan": "{plan}",
    "exact ÷ not exact, time": "{exact_over_not_exact:.2f}",
}


_RATIOS = {
    "batch": "{batch}",
    "arithmetic": "{arithmetic}",
    "teacher ÷ one step": "{one_step:.1f}",
    "teacher ÷ two steps": "{two_steps:.1f}",
}
_AGREEMENT = {
    "plan": "{plan}",
    "arithmetic": "{arithmetic}",
    "images": "{images}",
    "equal tokens": "{tokens:.1%}",
    "PSNR, dB (– all equal)": "{psnr_db:.1f}",
}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    plans = [{**row, "mark": "" if row["offered"] else " ∗"} for row in results.get("plans", [])]
    for row in plans:
        row["shown"] = (report.number(row["speed_up"]) or "–") if row["error"] is None else "failed"
    stages = [
        [
            row["batch"],
            row["plan"],
            *(f"{row['median_ms'][name]:.2f} ({row['share'][name]:.0%})" for name in STAGES),
            report.number(row["sum_over_whole_call"]),
        ]
        for row in results.get("stages", [])
    ]
    parts = [
        "Whole calls, from labels and seeds to pixels (∗ not offered, for comparison):",
        report.table(_PLANS, plans),
        "The ratios of Table 1 (in the paper 6.3 and 3.7 for VAR-d16, 217.8 and 116.5 for LlamaGen-L):",
        report.table(_RATIOS, results.get("ratios", [])),
        "Stages of the 1-step plan, in ms:",
        report.markdown_table(["batch", "plan", *STAGES, "sum ÷ whole call"], stages),
        "What it costs that an image has the same bytes in every batch:",
        report.table(_EXACTNESS, results.get("exactness", [])),
    ]
    if results.get("agreement"):
        parts += ["How near to the first arithmetic:", report.table(_AGREEMENT, results["agreement"])]
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> bool:
    """Measure and file; False if something failed on the way.

    Raises:
        DDError: no such bundle, device or plan, or numbers that cannot be trusted.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    settle(device)  # exact32 is what a server computes by that name
    names = arguments.arithmetic
    bundles = {name: load_bundle(arguments.bundle, device, choose(name, device)) for name in names}
    bundle = bundles[names[0]]
    marks = {name: name if len(names) > 1 else "" for name in names}
    lanes = [lane for name in names for lane in lanes_of(bundles[name], arguments.plans, marks[name])]
    teacher = teacher_name([Preset(lane.plan) for lane in lanes])
    identity = {"name": bundle.name, "digest": bundle.digest}
    config = report.configuration(device, torch.get_num_threads(), identity, report.own_options(arguments))
    plans = list(dict.fromkeys(lane.plan for lane in lanes if lane.offered))
    with report.filed(THEME, config, table, arguments.out) as results:
        results["agreement"] = compare(bundles, plans, arguments.compare) if len(names) > 1 else []
        for batch in arguments.batches:
            print(f"batch {batch}: {len(lanes)} lanes, {arguments.repeats} repeats", flush=True)
            conditions = {marks[name]: condition_of(bundles[name], batch) for name in names}
            samples = measure(lanes, conditions, batch, arguments.repeats)
            for key, rows in summarise(lanes, samples, batch, teacher).items():
                results.setdefault(key, []).extend(rows)
            failures = [f"batch {batch}, {name}: {error}" for name, error in samples.errors.items()]
            results["failures"].extend(failures)
            if failures and device.type == "cuda":
                torch.cuda.empty_cache()
    return not results["failures"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = report.parser("benchmarks.engine", "The engine alone, plan by plan.")
    parser.add_argument("--batches", type=report.whole_numbers, default=[1, 8, 32], help="such as 1,8,32")
    parser.add_argument("--repeats", type=report.positive, default=10, help="of every plan and batch size")
    parser.add_argument("--plans", type=report.names, help="names; left out, all of the bundle")
    about = f"of {', '.join(NAMES)}; the others are compared with the first"
    parser.add_argument("--arithmetic", type=report.names, default=["exact32"], help=about)
    parser.add_argument("--compare", type=report.positive, default=24, help="images of a plan to compare by")
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
