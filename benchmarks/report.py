"""The parts that every benchmark shares: facts of the machine, statistics, and how a result is filed.

    with filed(theme, configuration, table, out) as results:   # measure; fill `results`
        ...                                                    # → <out>/<theme>/<machine>-<date>.json + .md

A run that fails is filed too, with the error and what it had measured by then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dd_core.bundle import DEFAULT_BUNDLE
from dd_core.errors import DDError, InvalidRequestError
from dd_core.runtime import cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORMAT_VERSION = 1
_COMMON = ("device", "threads", "out", "smoke")
_PACKAGES = ("torch", "numpy", "pillow", "fastapi", "uvicorn", "httpx")


class BenchmarkError(DDError):
    """A run that could not be finished, or whose numbers cannot be trusted."""


def median(values: Sequence[float]) -> float:
    """The middle of `values`."""
    return float(statistics.median(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the neighbouring ranks, so with few values p95 and p99 are near the maximum."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent))


def milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p95 and p99 in ms; None of nothing."""
    return {f"p{p}": 1e3 * percentile(seconds, p) for p in (50, 95, 99)} if seconds else None


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over repeats of `over[i] / under[i]`.

    Each ratio is of two measurements made right after one another, so a machine that gets slower
    during the run changes both alike.

    Raises:
        ValueError: the two were not measured equally often.
    """
    return median([a / b for a, b in zip(over, under, strict=True)])


def resident_peak(pid: int | None = None) -> int:
    """Most resident memory that a process (None = this one) has had, in bytes.

    Linux hands `ru_maxrss` down from the process that started this one; VmHWM begins anew.

    Raises:
        OSError: another process is asked for where there is no /proc.
    """
    try:
        status = Path(f"/proc/{'self' if pid is None else pid}/status").read_text(encoding="utf-8")
    except OSError:
        if pid is not None:
            raise
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def reset_resident_peak() -> None:
    """Let this process's peak begin anew at what it holds; where there is no /proc nothing happens."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Facts that numbers depend on; no host name. `load_average` above 0 means that others computed too."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cuda = device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        **({"cuda": torch.version.cuda} if cuda else {}),
    }


def software_facts() -> dict[str, str]:
    """Versions of Python and of the packages whose speed is measured.

    A Python that was built without profile-guided optimisation, as pyenv does unless it is told, runs the
    same code up to 1.7 times as long.
    """
    optimised = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    found = {"python": platform.python_version() + ("" if optimised else " (not an optimised build)")}
    return found | {name: version(name) for name in _PACKAGES}


def commit_facts() -> dict[str, Any]:
    """The checkout's commit and whether files differ from it (filed results aside); None without git."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"hash": commit, "changed": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    # Without optional locks: a look at the state must not get in the way of other commands.
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def random_weights(*architectures: object) -> dict[str, str]:
    """The entry of a configuration in place of a bundle where there is none: name and digest of the sizes."""
    text = "\n".join(map(repr, architectures))
    return {"name": "random weights", "digest": hashlib.sha256(text.encode()).hexdigest()}


def configuration(
    device: torch.device, threads: int, bundle: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that it takes to run this again.

    Args:
        threads: of torch, where the model ran.
        bundle: its name and digest.
        options: the benchmark's own settings.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(device),
        "software": software_facts(),
        "threads": threads,
        "bundle": dict(bundle),
        "commit": commit_facts(),
        "options": {k: _told(v) for k, v in options.items()},
    }


def _told(value: Any) -> Any:
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute())
    return _place(Path(value)) if is_path else value


def _place(path: Path) -> str:
    """A path as a record has it: from the top of the project, or its name alone where it is elsewhere."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else path.name


def machine_slug(machine: Mapping[str, Any]) -> str:
    """A file name's part: the processor that computed, and the number of cores."""
    name = f"{machine['gpu'] or machine['cpu']} {machine['usable_cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@contextmanager
def filed(
    theme: str, config: dict[str, Any], table: Callable[[dict[str, Any]], str], out: Path
) -> Iterator[dict[str, Any]]:
    """Give the dictionary of results to fill; file it when the block ends, also when it fails.

    `results["failures"]`, a list that is there from the start, names what went wrong without
    ending the run. The file says `ok` only if it stays empty and the block ends well.

    Args:
        table: results → Markdown; it must cope with results that a failure left incomplete.
    """
    results: dict[str, Any] = {"failures": []}
    try:
        yield results
    except InvalidRequestError:
        raise  # a wrong option measures nothing
    except (Exception, KeyboardInterrupt) as error:
        results["failures"].append(describe(error))
        _file(theme, config, results, table(results), out)
        raise
    _file(theme, config, results, table(results), out)


def _file(theme: str, config: dict[str, Any], results: dict[str, Any], body: str, out: Path) -> None:
    """Write `<theme>/<machine>-<date>.json` and `.md`; a second run of a day gets `-2`, and so on."""
    record = {
        "format_version": FORMAT_VERSION,
        "theme": theme,
        "status": "failed" if results["failures"] else "ok",
        "configuration": config,
        "results": results,
    }
    folder = out / theme
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{machine_slug(config['machine'])}-{config['date'][:10]}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_page(record, body), encoding="utf-8")
    print(f"{body}\n\nfiled as {theme}/{path.stem}.json and .md ({record['status']})")


def unexpected(who: str, outcomes: Mapping[str, int], expected: Container[str] = ()) -> list[str]:
    """The failures of a load: how many requests had each outcome that is not expected."""
    return [f"{who}: {count} × {told}" for told, count in outcomes.items() if told not in expected]


def describe(error: BaseException) -> str:
    """One line for the file."""
    text = error.message if isinstance(error, DDError) else str(error)
    return f"{type(error).__name__}: {text}".replace("\n", " ")[:500]


def _page(record: dict[str, Any], body: str) -> str:
    config, commit = record["configuration"], record["configuration"]["commit"]
    machine, software = config["machine"], config["software"]
    changed = {None: "", False: "", True: " with changes"}[commit["changed"]]
    device = f"{machine['device']} ({machine['gpu']})" if machine["gpu"] else machine["device"]
    options = {
        key: " ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in config["options"].items()
    }
    rows = [
        ["status", record["status"]],
        ["date", config["date"]],
        ["processor", f"{machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores"],
        ["device", device],
        ["threads of torch", config["threads"]],
        ["load average at the start", ", ".join(map(str, machine["load_average"]))],
        ["niceness", machine["niceness"]],
        ["software", ", ".join(f"{name} {number}" for name, number in software.items())],
        ["bundle", f"{config['bundle']['name']} `{config['bundle']['digest'][:16]}`"],
        ["commit", f"{commit['hash'] or 'unknown'}{changed}"],
        ["options", ", ".join(f"{key} = {value}" for key, value in options.items())],
    ]
    failures = record["results"]["failures"]
    parts = [f"# {record['theme']}", markdown_table(["configuration", ""], rows), body]
    if failures:
        parts.append("\n".join(["**Failures**", "", *(f"- {failure}" for failure in failures)]))
    return "\n\n".join(parts) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; None is shown as a dash."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ["–" if cell is None else str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table with a line for each row; None where a column formats a number is shown as a dash.

    Args:
        columns: heading → format of the cell, of the row's keys.
    """
    lines = [[_cell(form, row) for form in columns.values()] for row in rows]
    return markdown_table(list(columns), lines)


def _cell(form: str, row: Mapping[str, Any]) -> str | None:
    try:
        return form.format_map(row)
    except TypeError:
        return None


def number(value: float | None, how: str = ".2f") -> str | None:
    """A table cell; None stays None."""
    return None if value is None else format(value, how)


def mib(size: float | None) -> str | None:
    """A table cell of bytes; None stays None."""
    return None if size is None else f"{size / 2**20:.0f}"


def positive(text: str) -> int:
    """The type of an option that is a positive whole number."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def whole_numbers(text: str) -> list[int]:
    """The type of an option such as `1,8,32`: positive whole numbers."""
    return [positive(part) for part in text.split(",")]


positive.__name__ = "positive whole number"  # argparse shows it in its message
whole_numbers.__name__ = "list of positive whole numbers"


def names(text: str) -> list[str]:
    """The type of an option such as `a,b`."""
    return text.split(",")


def parser(name: str, about: str, *, bundle: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has, as a parser that others can be added to."""
    made = argparse.ArgumentParser(f"python -m {name}", description=about)
    if bundle:
        made.add_argument("--bundle", default=DEFAULT_BUNDLE, help="built-in model, or a bundle's folder")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--threads", type=positive, help="of torch; left out, torch chooses")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    made.add_argument("--smoke", action="store_true", help="a run that checks the benchmark itself")
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None, smoke: Sequence[str] = ()
) -> argparse.Namespace:
    """The options; with `--smoke` those in `smoke` hold where the command line names no other."""
    given = list(sys.argv[1:] if argv is None else argv)
    return made.parse_args([*smoke, *given] if made.parse_args(given).smoke else given)


def own_options(chosen: argparse.Namespace) -> dict[str, Any]:
    """The settings of one benchmark alone, as they are filed."""
    return {name: value for name, value in vars(chosen).items() if name not in _COMMON}


def run_command(run: Callable[[argparse.Namespace], bool], arguments: argparse.Namespace) -> int:
    """Run a benchmark as a command; 0, 1 for a run that was filed as failed, 2 for a user's error."""
    # As Ctrl-C does: a run that is ended is filed, and the processes that it started are ended too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return 0 if run(arguments) else 1
    except DDError as error:
        print(f"benchmarks: error: {error.message}", file=sys.stderr)
        return 1 if isinstance(error, BenchmarkError) else 2
    finally:
        signal.signal(signal.SIGTERM, before)
