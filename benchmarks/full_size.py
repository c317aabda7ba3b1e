"""Published sizes on this machine: pulled, converted, served and answered, with the peak memory of each.

    random weights ─▶ files as published ─▶ stand-in hub ─▶ `dd-server convert` ─▶ `dd-server serve` ─▶ images

The weights cannot be had here, so they are random, under the published names and in the published
nesting; everything after that is the path that a user's `dd-server serve NAME` takes. Each step is
a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import http.client
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.processes import HOST, ServerProcess, environment
from dd_core.hub.registry import find_spec
from dd_core.hub.spec import ModelSpec
from tests.hub import FakeHub, tiny_modules
from tests.upstream import reference_state

MODELS = ("var-dd-d16", "llamagen-dd-l")
_MIB = 2**20


def make_files(spec: ModelSpec, folder: Path) -> None:
    """Writes the files of a model with random weights, `folder/REPO/FILE`."""
    modules = tiny_modules(spec)
    for part, remote in spec.files.items():
        content: Any = reference_state(modules[part])
        for key in reversed(remote.places[0]):
            content = {key: content}
        path = folder / remote.repo / remote.file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)


def serve_files(folder: Path) -> None:
    """The stand-in hub over `folder`, until standard input ends; prints its address."""
    hub = FakeHub()
    for path in folder.rglob("*"):
        if path.is_file():
            owner, name, *rest = path.relative_to(folder).parts
            with path.open("rb") as file:
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            hub.add(f"{owner}/{name}", "/".join(rest), mapped)  # type: ignore[arg-type]
    with hub.running():
        print(hub.url, flush=True)
        sys.stdin.read()


@contextmanager
def _hub(folder: Path, env: dict[str, str]) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.full_size", "--hub", str(folder)]
    process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def _step(arguments: Sequence[str], env: dict[str, str]) -> dict[str, float]:
    """Runs a Python module to its end: seconds and peak memory.

    Raises:
        BenchmarkError: it failed; with the end of what it said.
    """
    code = (
        "import runpy, sys\n"
        "from benchmarks.report import resident_peak\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "finally:\n    print('PEAK', resident_peak(), file=sys.stderr)\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise report.BenchmarkError(f"{' '.join(arguments)}: {(done.stderr or done.stdout)[-400:]}")
    peak = next(line for line in reversed(done.stderr.splitlines()) if line.startswith("PEAK"))
    return {"seconds": seconds, "peak_mib": int(peak.split()[1]) / _MIB}


def _generate(port: int, body: dict[str, Any]) -> tuple[float, str, bytes]:
    """Seconds, plan and image of one request."""
    connection = http.client.HTTPConnection(HOST, port, timeout=600)
    headers = {"accept": "image/png", "content-type": "application/json"}
    started = time.perf_counter()
    try:
        connection.request("POST", "/generate", json.dumps(body), headers)
        reply = connection.getresponse()
        content = reply.read()
    finally:
        connection.close()
    if reply.status != 200:
        raise report.BenchmarkError(f"status {reply.status}: {content[:300]!r}")
    return time.perf_counter() - started, reply.headers["x-dd-plan"], content


def measure(name: str, spec: ModelSpec, scratch: Path, device: str, threads: int | None) -> dict[str, Any]:
    """All steps of one model, in `scratch`."""
    env = environment(threads) | {
        "HF_HOME": str(scratch / "hub-cache"),
        "DD_HOME": str(scratch / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    make_files(spec, scratch / "published")
    files = [p for p in (scratch / "published").rglob("*") if p.is_file()]
    results: dict[str, Any] = {"published_mib": sum(p.stat().st_size for p in files) / _MIB}
    with _hub(scratch / "published", env) as url:
        env["HF_ENDPOINT"] = url
        results["pull"] = _step(["server", "pull", name], env)
        results["convert"] = _step(["server", "convert", name], env)
    started = time.perf_counter()
    with ServerProcess(name, device, 4, env | {"HF_HUB_OFFLINE": "1"}) as server:
        results["ready_seconds"] = time.perf_counter() - started
        entry = server.model()
        results["plans"] = []
        for budget in entry["budgets"]:
            request = {"label": 207 if len(entry["classes"]) > 207 else 3, "seed": 7, "steps": budget["from"]}
            first = _generate(server.port, request)
            again = _generate(server.port, request)
            if first[2] != again[2]:
                raise report.BenchmarkError(f"{name} {first[1]}: other bytes at the second time")
            row = {"plan": first[1], "steps": budget["from"], "seconds": min(first[0], again[0])}
            results["plans"].append(row)
        results["serve_peak_mib"] = report.resident_peak(server.pid) / _MIB
    return results


def table(results: dict[str, Any]) -> str:
    """One row a model, and its plans."""
    head = ["model", "published files MiB", "pull peak MiB", "convert peak MiB", "serve peak MiB", "ready s"]
    rows, plans = [], []
    for name, found in results.get("models", {}).items():
        rows.append(
            [name, f"{found['published_mib']:.0f}"]
            + [f"{found[step]['peak_mib']:.0f}" for step in ("pull", "convert")]
            + [f"{found['serve_peak_mib']:.0f}", f"{found['ready_seconds']:.0f}"]
        )
        plans += [[name, p["plan"], str(p["steps"]), f"{p['seconds']:.2f}"] for p in found["plans"]]
    parts = [report.markdown_table(head, rows)]
    parts.append(report.markdown_table(["model", "plan", "passes", "seconds an image"], plans))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, or (`--hub DIR`) is its stand-in hub."""
    parser = argparse.ArgumentParser("python -m benchmarks.full_size", description="Published sizes here.")
    parser.add_argument("--hub", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--scratch", type=Path, help="where about 10 GiB fit for a while")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    chosen = parser.parse_args(argv)
    if chosen.hub is not None:
        serve_files(chosen.hub)
        return 0
    names = chosen.models.split(",")
    options = {"models": names, "threads": chosen.threads}
    config = report.configuration(
        torch.device(chosen.device), chosen.threads or os.cpu_count() or 1,
        {"name": "random weights", "digest": "none"}, options,
    )  # fmt: skip
    with report.filed("full-size", config, table, chosen.out) as results:
        results["models"] = {}
        for name in names:
            with tempfile.TemporaryDirectory(dir=chosen.scratch) as scratch:
                folder = Path(scratch)
                results["models"][name] = measure(
                    name, find_spec(name), folder, chosen.device, chosen.threads
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
