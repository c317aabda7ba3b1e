"""Published sizes on this machine: pulled, converted, served and answered, with the peak memory of each.

    random weights ─▶ files as published ─▶ stand-in hub ─▶ `dd-server pull`, `convert`, `serve` ─▶ images

The weights cannot be had here, so they are random, under the published names and in the published
nesting; everything after that is what a user's `dd-server serve NAME` does. Each step is a process of
its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import mmap
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.accounts import descendants
from benchmarks.processes import Server, environment, run_module, serving
from dd_core.errors import InvalidRequestError
from dd_core.hub.registry import find_spec, registry
from dd_core.hub.spec import ModelSpec
from dd_core.runtime import pick_device
from tests.hub import FakeHub, content_of, random_modules, tiny_spec

THEME = "full-size"
MODELS = ("var-dd-d16", "llamagen-dd-l")
SEED = 7
# Warm-up runs every plan: 401 passes for LlamaGen-L, which a busy machine may take long for.
_PATIENCE = 3600.0


def specs_of(names: Sequence[str], smoke: bool) -> dict[str, ModelSpec]:
    """The published models by name; for a smoke run shrunk to the smallest of their kind.

    Raises:
        BundleNotFoundError: no such name.
    """
    return {name: tiny_spec(name) if smoke else find_spec(name) for name in names}


def make_files(spec: ModelSpec, folder: Path) -> None:
    """Writes the files of a model with random weights, `folder/REPO/FILE`."""
    modules = random_modules(spec)
    for part, remote in spec.files.items():
        path = folder / remote.repo / remote.file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content_of(spec, part, modules.pop(part)), path)


@contextmanager
def _hub(folder: Path) -> Iterator[str]:
    """The address of a stand-in hub over `folder`.

    Raises:
        BenchmarkError: a file cannot be served.
    """
    hub = FakeHub()
    try:
        for path in (p for p in folder.rglob("*") if p.is_file()):
            key = path.relative_to(folder).as_posix()
            with path.open("rb") as file:
                hub.files[key] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            hub.sha256(key)  # gigabytes: a client would not wait for it
    except (OSError, ValueError) as error:
        raise report.BenchmarkError(f"the stand-in hub did not start: {error}") from error
    with hub.running():
        yield hub.url


def run_server_command(arguments: Sequence[str], smoke: bool) -> None:
    """Run `dd-server` as the process of `_step`, and at the end print its own peak memory on a line.

    In a smoke run the published names stand for tiny models, in this process alone.
    """
    from server.cli import main as dd_server

    if smoke:
        registry().update(specs_of(MODELS, smoke))
    sys.argv = ["dd-server", *arguments]
    try:
        dd_server()
    finally:
        print(report.resident_peak())


def _step(arguments: Sequence[str], smoke: bool, env: dict[str, str]) -> dict[str, float]:
    """Runs `dd-server` to its end: seconds and peak memory.

    Raises:
        BenchmarkError: it failed; with what it said.
    """
    started = time.perf_counter()
    printed = run_module(
        "benchmarks.full_size", *(["--smoke"] if smoke else []), "--as-server", *arguments,
        env=env, about=f"dd-server {' '.join(arguments)}",
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": int(printed.splitlines()[-1])}


def _generate(server: Server, body: Mapping[str, Any]) -> tuple[float, str, bytes]:
    started = time.perf_counter()
    reply = server.generate(body, "image/png")
    return time.perf_counter() - started, reply.headers["x-dd-plan"], reply.content


def ask_every_budget(server: Server, rows: list[dict[str, Any]]) -> None:
    """Each plan that a budget can lead to, asked for twice: `rows` gets its name, passes and seconds.

    Raises:
        BenchmarkError: a request failed, was answered by another plan, or had other bytes the second time.
    """
    entry = server.model()
    for budget in entry["budgets"]:
        label, steps = len(entry["classes"]) - 1, budget["from"]
        request = {"label": label, "seed": SEED, "steps": steps, "brownout": False}
        print(f"{entry['name']}: {budget['plan']}", flush=True)
        first, again = _generate(server, request), _generate(server, request)
        if first[1] != budget["plan"]:
            raise report.BenchmarkError(f"{entry['name']}: {first[1]} answered for {budget['plan']}")
        if first[2] != again[2]:
            raise report.BenchmarkError(f"{entry['name']}, {first[1]}: other bytes the second time")
        rows.append({"plan": first[1], "passes": steps, "seconds": [first[0], again[0]]})


def measure(
    spec: ModelSpec, scratch: Path, device: str, threads: int | None, smoke: bool, results: dict[str, Any]
) -> None:
    """Run every step of one model, in `scratch`; fills `results` as it goes.

    Raises:
        BenchmarkError: a step failed, or the server's answers are wrong.
    """
    home, cache = str(scratch / "home"), str(scratch / "hub-cache")
    env = environment(threads) | {"DD_HOME": home, "HF_HOME": cache, "HF_HUB_DISABLE_TELEMETRY": "1"}
    published = scratch / "published"
    print(f"{spec.name}: making files", flush=True)
    make_files(spec, published)
    results["published_bytes"] = sum(p.stat().st_size for p in published.rglob("*") if p.is_file())
    with _hub(published) as url:
        for step in ("pull", "convert"):
            print(f"{spec.name}: {step}", flush=True)
            results[step] = _step([step, spec.name], smoke, env | {"HF_ENDPOINT": url})
    print(f"{spec.name}: serve", flush=True)
    started = time.perf_counter()
    offline = env | {"HF_HUB_OFFLINE": "1"}
    with serving(spec.name, device, 1, offline, patience=_PATIENCE) as server:
        results["serve"] = {"seconds": time.perf_counter() - started}
        ask_every_budget(server, results.setdefault("plans", []))
        processes = (server.pid, *descendants(server.pid))
        results["serve"]["peak_bytes"] = sum(map(report.resident_peak, processes))


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows, plans = [], []
    for name, found in results.get("models", {}).items():
        steps = [found.get(step, {}) for step in ("pull", "convert", "serve")]
        seconds = [report.number(step.get("seconds"), ".0f") for step in steps]
        peaks = [report.mib(step.get("peak_bytes")) for step in steps]
        rows.append([name, report.mib(found.get("published_bytes")), *seconds, *peaks])
        plans += [
            [name, row["plan"], row["passes"], report.number(min(row["seconds"]))]
            for row in found.get("plans", [])
        ]
    columns = [
        "model", "files, MiB", "pull, s", "convert, s", "start to ready, s",
        "pull, peak MiB", "convert, peak MiB", "serve, peak MiB",
    ]  # fmt: skip
    parts = [
        "Random weights in the published files. A server is ready once it has run every plan:",
        report.markdown_table(columns, rows),
        "One image over HTTP, the faster of two:",
        report.markdown_table(["model", "plan", "passes", "seconds"], plans),
    ]
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> bool:
    """Measure and file; False if a model failed.

    Raises:
        DDError: no such device or model.
    """
    if arguments.as_server is not None:
        run_server_command(arguments.as_server, arguments.smoke)
        return True
    if arguments.scratch is not None and not arguments.scratch.is_dir():
        raise InvalidRequestError(f"--scratch: {arguments.scratch} is no folder", param="scratch")
    device, specs = pick_device(arguments.device), specs_of(arguments.models, arguments.smoke)
    identity = report.random_weights(*specs.values())
    options = {"models": arguments.models, "smoke": arguments.smoke}
    threads = arguments.threads or torch.get_num_threads()
    config = report.configuration(device, threads, identity, options)
    with report.filed(THEME, config, table, arguments.out) as results:
        results["models"] = {}
        for name, spec in specs.items():
            found: dict[str, Any] = {}
            results["models"][name] = found
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
                try:
                    measure(spec, Path(scratch), str(device), arguments.threads, arguments.smoke, found)
                except (report.BenchmarkError, OSError, RuntimeError) as error:  # the others go on
                    results["failures"].append(f"{name}: {report.describe(error)}")
    return not results["failures"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    about = "Published sizes on this machine, from hub to image."
    parser = report.parser("benchmarks.full_size", about, bundle=False)
    parser.add_argument(
        "--models",
        type=report.names,
        default=list(MODELS),
        help=f"of {', '.join(n for n, spec in registry().items() if not spec.reads_text)}",
    )
    parser.add_argument("--scratch", type=Path, help="where about 12 GB fit for a while; left out, /tmp")
    parser.add_argument("--as-server", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return report.run_command(run, report.parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main())
