"""The real server, and the raw loop in as many processes as that has on its devices."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx
import torch

from benchmarks import report
from benchmarks.client import HOST
from benchmarks.report import ROOT, BenchmarkError
from dd_core.bundle import find_bundle
from dd_core.errors import InvalidRequestError
from dd_core.manifest import read_manifest
from server.devices.placement import WorkerSpec, usable_cores, worker_specs
from server.models.catalog import find
from server.settings import ENV_PREFIX

_START = 600.0  # seconds to load a model and warm up every plan
_STOP = 60.0


def environment(threads: int | None) -> dict[str, str]:
    """This process's environment, without settings of the server, with `threads` for torch."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    # Not by the working directory, which relative paths of bundles refer to.
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    if threads is not None:
        kept["OMP_NUM_THREADS"] = str(threads)
    return kept


def started(chosen: argparse.Namespace) -> list[WorkerSpec]:
    """The device processes that the server of a command line (`bundle`, `device`, `threads`) starts.

    Raises:
        DDError: no such bundle or device.
    """
    return worker_specs(chosen.device, chosen.threads or 0, find(chosen.bundle).bytes, usable_cores())


def server_configuration(chosen: argparse.Namespace) -> dict[str, Any]:
    """The configuration of a benchmark of a server, with the processes that the server starts.

    Args:
        chosen: the command line, as for `started`.

    Raises:
        DDError: no such bundle or device.
    """
    processes, manifest = started(chosen), read_manifest(find_bundle(chosen.bundle))
    return report.configuration(
        torch.device(processes[0].device),
        processes[0].threads or torch.get_num_threads(),
        {"name": manifest.name, "digest": manifest.digest},
        {**report.own_options(chosen), "processes": len(processes)},
    )


def run_with_server(
    theme: str,
    table: Callable[[dict[str, Any]], str],
    measure: Callable[[argparse.Namespace, Server, dict[str, Any]], None],
    chosen: argparse.Namespace,
) -> bool:
    """File what `measure` finds out about the server of a command line; False if something failed.

    Raises:
        DDError: no such bundle or device, or a wrong option.
        BenchmarkError: the numbers cannot be trusted, or a process ended.
    """
    config = server_configuration(chosen)
    with report.filed(theme, config, table, chosen.out) as results, serving_of(chosen) as server:
        measure(chosen, server, results)
    return not results["failures"]


def run_module(
    name: str, *arguments: str, about: str, env: Mapping[str, str] | None = None, given: str = ""
) -> str:
    """Run one of our modules as a process of its own to its end; what it printed.

    Args:
        about: what an error begins with.
        env: its environment; None = that of `environment`.
        given: the standard input.

    Raises:
        BenchmarkError: it failed; with the last of what it said.
    """
    command = [sys.executable, "-m", name, *arguments]
    done = subprocess.run(
        command, env=env or environment(None), input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        # Of a traceback the error itself; else all, since a message may go over several lines.
        raise BenchmarkError(f"{about}: {said.splitlines()[-1] if 'Traceback' in said else said[-400:]}")
    return done.stdout


def check_steps(model: Mapping[str, Any], steps: int) -> None:
    """Refuse a budget that a model has no plan for.

    Args:
        model: the entry of `GET /models`.

    Raises:
        InvalidRequestError: it is out of the model's range.
    """
    least, most = model["steps"]["min"], model["steps"]["max"]
    if not least <= steps <= most:
        raise InvalidRequestError(
            f"steps must be from {least} to {most} for {model['name']}, not {steps}", param="steps"
        )


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class RawLoop:
    """`benchmarks.raw_loop` in a process for each place; images and batches are shared out.

    Args:
        form, determinism: of the server that it is held against.

    Raises:
        BenchmarkError: a process ended without an answer.
    """

    def __init__(
        self, bundle: str, places: Sequence[WorkerSpec], form: str = "png", determinism: str = "exact"
    ) -> None:
        command = [sys.executable, "-m", "benchmarks.raw_loop", bundle]
        command += ["--format", form, "--determinism", determinism]
        self._processes = [
            subprocess.Popen(
                [*command, "--device", place.device],
                env=environment(place.threads or None),
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for place in places
        ]
        try:
            self.digest, *_ = (_answer(process)["digest"] for process in self._processes)
        except BaseException:
            self.__exit__()
            raise

    def seconds(self, plan: str, batch: int, images: int) -> float:
        """The time that so many images take, `batch` of them at a time."""
        used = self._processes[:batch]
        order = {"plan": plan, "batch": -(-batch // len(used)), "images": -(-images // len(used))}
        for process in used:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(order) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise BenchmarkError("the raw loop has ended; its error is above") from None
        answers = [_answer(process) for process in used]
        made = sum(answer["images"] for answer in answers)  # the last batch may have made a few more
        return float(max(answer["seconds"] for answer in answers) * images / made)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            _end(process)
            process.stdout.close()


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchmarkError(f"the raw loop ended with exit code {process.wait(_STOP)}")
    answer: dict[str, Any] = json.loads(line)
    return answer


@dataclass(frozen=True)
class Server:
    """A server that is ready, and the requests that benchmarks make of it beside their load."""

    port: int
    pid: int
    http: httpx.Client
    patience: float  # seconds that an image may take

    def model(self) -> dict[str, Any]:
        """The one entry of `GET /models`, of a model of classes.

        Raises:
            InvalidRequestError: it is one of texts, and benchmarks over HTTP send classes.
        """
        entry: dict[str, Any] = self.http.get("/models").json()["models"][0]
        if not entry["classes"]:
            raise InvalidRequestError(
                f"bundle must be a model of classes, which this benchmark sends; {entry['name']} takes texts",
                param="bundle",
            )
        return entry

    def generate(self, body: Mapping[str, Any], accept: str = "application/json") -> httpx.Response:
        """The reply of `POST /generate`.

        Raises:
            BenchmarkError: it is not 200.
        """
        headers = {"accept": accept}
        reply = self.http.post("/generate", json=body, headers=headers, timeout=self.patience)
        if reply.status_code != 200:
            raise BenchmarkError(f"{dict(body)}: status {reply.status_code}, {reply.content[:300]!r}")
        return reply

    def batches(self, at_least: float = 0.0) -> tuple[float, float]:
        """Images and batches computed so far, from `/metrics`.

        A batch is counted a moment after its replies: this waits until there are `at_least` images.
        """
        images, batches = -1.0, 0.0
        for _ in range(50):
            text = self.http.get("/metrics").text
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            images, batches = (float(values[f"dd_batch_size_{part}"]) for part in ("sum", "count"))
            if images >= at_least:
                break
            time.sleep(0.02)
        return images, batches


@contextmanager
def serving(
    bundle: str,
    device: str,
    max_batch: int,
    env: dict[str, str] | None = None,
    patience: float = _START,
    threads: int | None = None,
    module: str = "server",
    options: Sequence[str] = (),
) -> Iterator[Server]:
    """`dd-server serve` on a free port of the loopback interface, ready when the block begins.

    Args:
        env: its environment; None = that of `environment`.
        threads: of each device process on a CPU; None = as the server chooses.
        patience: seconds to load the model and to run every plan once.
        module: run in place of `server`.
        options: more of the server's.

    Raises:
        BenchmarkError: it ended, or was not ready in time; with the last lines of its log.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", module, "serve", bundle, "--host", HOST, "--port", str(port)),
        *("--device", device, "--max-batch", str(max_batch), "--log-level", "warning"),
        *(("--threads", str(threads)) if threads is not None else ()),
        *options,
    ]
    # A connection for each request: none is found closed after a long load in between.
    limits, url = httpx.Limits(max_keepalive_connections=0), f"http://{HOST}:{port}"
    with (
        tempfile.TemporaryFile() as log,
        httpx.Client(base_url=url, timeout=10, limits=limits, trust_env=False) as http,
    ):
        process = subprocess.Popen(
            command, env=env or environment(None), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            problem = _wait_until_ready(process, http, patience)
            if problem:
                log.seek(0)
                last = " / ".join(log.read().decode(errors="replace").splitlines()[-5:])
                raise BenchmarkError(f"the server {problem}: {last}")
            yield Server(port, process.pid, http, patience)
        finally:
            process.terminate()
            _end(process)


def serving_of(chosen: argparse.Namespace, module: str = "server") -> AbstractContextManager[Server]:
    """The server of a command line (`bundle`, `device`, `max_batch`, `threads`, and `determinism` if it has
    that).
    """
    determinism = getattr(chosen, "determinism", None)
    options = ("--determinism", determinism) if determinism else ()
    most, threads = chosen.max_batch, chosen.threads
    return serving(chosen.bundle, chosen.device, most, threads=threads, module=module, options=options)


def _wait_until_ready(process: subprocess.Popen[bytes], http: httpx.Client, patience: float) -> str | None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        code = process.poll()
        if code is not None:
            return f"ended with exit code {code}"
        try:
            if http.get("/readyz").is_success:
                return None
        except httpx.HTTPError:
            pass  # it does not listen before the model is loaded
        time.sleep(0.1)
    return f"was not ready after {patience:.0f} s"


def _end(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
