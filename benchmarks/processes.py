"""What is compared: the real server, and the raw loop in as many processes as that has on its devices."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from benchmarks import report
from benchmarks.report import ROOT, BenchmarkError
from dd_core.errors import InvalidRequestError
from server.devices.placement import WorkerSpec, usable_cores, worker_specs
from server.models.catalog import find
from server.settings import ENV_PREFIX

HOST = "127.0.0.1"
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


def server_configuration(chosen: argparse.Namespace, options: Mapping[str, Any]) -> dict[str, Any]:
    """What it takes to run a benchmark of a server again, with the processes that the server starts.

    Args:
        chosen: the command line, as for `started`.
        options: the benchmark's own settings.

    Raises:
        DDError: no such bundle or device.
    """
    processes = started(chosen)
    return report.configuration(
        torch.device(processes[0].device),
        processes[0].threads or torch.get_num_threads(),
        report.identity_of(chosen.bundle),
        {**options, "processes": len(processes)},
    )


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class RawLoop:
    """`benchmarks.raw_loop` in a process for each place; images and batches are shared out.

    Raises:
        InvalidRequestError: the bundle or the device does not exist; the loop's own message.
        BenchmarkError: the process ended without an answer.
    """

    def __init__(self, bundle: str, places: Sequence[WorkerSpec]) -> None:
        self._processes = []
        for place in places:
            command = [sys.executable, "-m", "benchmarks.raw_loop", bundle, "--device", place.device]
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=environment(place.threads or None),
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
        try:
            self.facts, *_ = map(_answer, self._processes)
            if "error" in self.facts:
                raise InvalidRequestError(self.facts["error"], param="bundle")
        except BaseException:
            self.__exit__()
            raise

    def run(self, plan: str, batch: int, images: int) -> dict[str, Any]:
        """At least `images` images, `batch` of them at a time: how many there were, and the seconds."""
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
        return {
            "images": sum(answer["images"] for answer in answers),
            "seconds": max(answer["seconds"] for answer in answers),
        }

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


class ServerProcess:
    """`dd-server serve` on a free port of the loopback interface, ready when the `with` block begins.

    Args:
        threads: of each device process on a CPU; None = as the server chooses.
        flags: more of the command's.
        patience: seconds to load the model and to run every plan once.
        module: run in place of `server`.

    Raises:
        BenchmarkError: it ended, or was not ready in time; with the last lines of its log.
    """

    def __init__(
        self,
        bundle: str,
        device: str,
        max_batch: int,
        env: dict[str, str],
        flags: Sequence[str] = (),
        patience: float = _START,
        threads: int | None = None,
        module: str = "server",
    ) -> None:
        self.port = free_port()
        self._module = module
        self.arguments = [
            *("serve", bundle, "--host", HOST, "--port", str(self.port), "--device", device),
            *("--max-batch", str(max_batch), "--log-level", "warning"),
            *(("--threads", str(threads)) if threads is not None else ()),
            *flags,
        ]
        self._env = env
        self._patience = patience

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", self._module, *self.arguments]
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, env=self._env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        _end(self._process)
        self._log.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            code = self._process.poll()
            if code is not None:
                raise BenchmarkError(f"the server ended with exit code {code}: {self._last_lines()}")
            try:
                if self._get("/readyz")[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass  # it does not listen before the model is loaded
            time.sleep(0.1)
        raise BenchmarkError(f"the server was not ready after {self._patience:.0f} s: {self._last_lines()}")

    def _last_lines(self) -> str:
        self._log.seek(0)
        return " / ".join(self._log.read().decode(errors="replace").splitlines()[-5:])

    def _get(self, path: str) -> tuple[int, bytes]:
        return self._ask("GET", path, None, timeout=10)

    def _ask(self, method: str, path: str, body: str | None, timeout: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"content-type": "application/json"} if body else {})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def model(self) -> dict[str, Any]:
        """The one entry of `GET /models`."""
        entry: dict[str, Any] = json.loads(self._get("/models")[1])["models"][0]
        return entry

    def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON reply of `POST /generate`.

        Raises:
            BenchmarkError: it is not 200.
        """
        status, content = self._ask("POST", "/generate", json.dumps(body), timeout=_START)
        if status != 200:
            raise BenchmarkError(f"status {status}: {content[:300]!r}")
        reply: dict[str, Any] = json.loads(content)
        return reply

    def batches(self, at_least: float = 0.0) -> tuple[float, float]:
        """Images and batches computed so far, from `/metrics`.

        A batch is counted a moment after its replies: this waits until there are `at_least` images.
        """
        images, batches = -1.0, 0.0
        for _ in range(50):
            text = self._get("/metrics")[1].decode()
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            images, batches = (float(values[f"dd_batch_size_{part}"]) for part in ("sum", "count"))
            if images >= at_least:
                break
            time.sleep(0.02)
        return images, batches


def _end(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
