"""What there is to find out about a GPU, in three calls of ten minutes: `speed`, `serving`, `training`.

    steps of the call, each in a process of its own, with its own time ─▶ OUT/CALL.json after each ─▶ a table

A step that fails or takes too long is passed over. Weights are random: those of the built-in models are not
needed, and may be left behind. `--tiny --device cpu` tries everything on a CPU in its smallest size.

`benchmarks/README.md` says how a machine without network gets what it lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CALLS = ("speed", "serving", "training")
_GRACE = 10.0  # seconds for a step to file what it has, when its time is over
_SHOWN = 6000  # characters of what a step printed that are kept


@dataclass(frozen=True)
class Step:
    """A command and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def speed(device: str, out: str, tiny: bool) -> list[Step]:
    """Versions and ceilings; tests; graphs against naive, exact against fast; the dearest kernels."""
    common = ("--device", device, "--out", out, *(["--smoke"] if tiny else []))
    low = "exact32" if tiny else "bf16"
    models = () if tiny else ("--models", "VAR-DD-d16")
    others = () if tiny else ("--models", "LlamaGen-DD-L")
    return [
        Step("facts", (sys.executable, "-c", _FACTS), 30),
        Step(
            "tests",
            _module("pytest", "-q", "-m", "gpu", "tests/gpu", "--ignore=tests/gpu/test_server.py"),
            150,
        ),
        Step(
            "graphs of VAR",
            _module("benchmarks.graphs", *common, *models, "--arithmetic", low, "--teacher"),
            90,
        ),
        Step("graphs of LlamaGen", _module("benchmarks.graphs", *common, *others, "--arithmetic", low), 90),
        Step("roofline", _module("benchmarks.roofline", *common, "--arithmetic", low), 60),
        Step("kernels", _module("benchmarks.kernels", *common, "--arithmetic", low), 60),
        Step("float32", _module("benchmarks.graphs", *common, *models, "--arithmetic", "exact32"), 60),
    ]


def serving(device: str, out: str, tiny: bool) -> list[Step]:
    """A server with random weights of d16's size: exact and fast, PNG and JPEG, by 1, 8 and 64 clients."""
    folder = str(Path(out).resolve() / "bundle")
    name = "tiny" if tiny else "var-dd-d16"
    load = ["--bundle", folder, "--device", device, "--out", out, "--steps", "1", "--rounds", "1"]
    load += ["--concurrency", "2" if tiny else "1,8,64", "--requests", "4" if tiny else "400"]
    load += ["--max-batch", "4" if tiny else "64"]
    steps = [Step("weights", _module("benchmarks.random_bundle", name, folder), 120)]
    for determinism in ("exact", "fast"):
        for form in ("png", "jpeg"):
            options = ("--determinism", determinism, "--format", form)
            steps.append(
                Step(f"{determinism}, {form}", _module("benchmarks.http_load", *load, *options), 100)
            )
    return [*steps, Step("clean up", (sys.executable, "-c", _REMOVE, folder), 20)]


def training(device: str, out: str, tiny: bool) -> list[Step]:
    """Teacher, pairs and student in the run folder `$RUN`, which has a tokenizer and its tokens, or a teacher
    too; none of them reads images. What a stage did within its time is kept: the next call goes on there.
    """
    run = os.environ.get("RUN", str(Path(out) / "run"))
    common = ("--out", run, "--device", device)
    if tiny:  # begins from random weights, since the perceptual loss of a tokenizer has to be fetched
        weights = str(Path(out) / "weights")
        small = ("--recipe", "tiny", "--set", "data=none", "--set", "distill.lpips=0")
        return [
            Step("weights", _module("benchmarks.random_bundle", "tiny", weights), 60),
            Step("start", _module("training", "start", weights, *small, *common), 60),
            *(Step(stage, _module("training", stage, *common), 60) for stage in ("pairs", "distill")),
        ]
    changes = ("distill.steps=12000", "distill.lpips_share=0.125", "pairs.count=200000")
    settings = ("--recipe", "gpu", *(word for change in changes for word in ("--set", change)))
    seconds = {"teacher": 200.0, "pairs": 170.0, "distill": 190.0}
    return [
        Step(stage, _module("training", stage, *common, *settings), limit) for stage, limit in seconds.items()
    ]


_REMOVE = "import shutil, sys; shutil.rmtree(sys.argv[1])"
_FACTS = """
import platform, sys, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
for number in range(torch.cuda.device_count()):
    print(number, torch.cuda.get_device_properties(number))
"""
PLANS = {"speed": speed, "serving": serving, "training": training}


def run_step(step: Step, left: float) -> dict[str, Any]:
    """Run a step to its end, or to the end of its time: what it said, and how it ended."""
    started, limit = time.perf_counter(), min(step.seconds, left)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
        ended = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        said, ended = _ended(process), f"ended after {limit:.0f} s"
    return {
        "step": step.name,
        "good": ended == "exit code 0",
        "ended": ended,
        "seconds": round(time.perf_counter() - started, 1),
        "said": said[-_SHOWN:],
    }


def _ended(process: subprocess.Popen[str]) -> str:
    """End a step, which files what it has and ends the servers that it started; then whatever is left of it,
    since that would keep the GPU. Return what it said.
    """
    process.terminate()
    try:
        return process.communicate(timeout=_GRACE)[0]
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def run_call(steps: Sequence[Step], path: Path, seconds: float) -> list[dict[str, Any]]:
    """Run the steps of a call within its time; `path` holds what is known after each."""
    ends, found = time.perf_counter() + seconds, list[dict[str, Any]]()
    path.parent.mkdir(parents=True, exist_ok=True)
    for step in steps:
        left = ends - time.perf_counter()
        if left > 0:
            print(f"{step.name}: {left:.0f} s left", flush=True)
            found.append(run_step(step, left))
        else:
            found.append(
                {"step": step.name, "good": False, "ended": "no time left", "seconds": 0.0, "said": ""}
            )
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """What each step said, then how each ended."""
    said = [f"## {row['step']}\n\n{row['said'].strip()}" for row in found]
    lines = ["| step | ended | seconds |", "|---|---|---|"]
    lines += [f"| {row['step']} | {row['ended']} | {row['seconds']} |" for row in found]
    return "\n\n".join([*said, "\n".join(lines)])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if all steps were good."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_hour", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-hour"), help="folder of what is found")
    parser.add_argument("--tiny", action="store_true", help="everything in its smallest size")
    parser.add_argument("--seconds", type=float, default=570.0, help="of the whole call")
    parser.add_argument("--slow", type=float, default=1.0, help="so many times as long, for a busy machine")
    chosen = parser.parse_args(argv)
    steps = PLANS[chosen.call](chosen.device, str(chosen.out.resolve()), chosen.tiny)
    steps = [replace(step, seconds=chosen.slow * step.seconds) for step in steps]
    found = run_call(steps, chosen.out / f"{chosen.call}.json", chosen.slow * chosen.seconds)
    print(table(found))
    return 0 if all(row["good"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
