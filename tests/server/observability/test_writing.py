"""Standard error that nobody reads holds up nothing: not a request, not the end."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import httpx
import pytest

from server.observability.writing import MOST_LINES, QueueHandler
from tests.server.helpers import OK, PATIENCE, eventually
from tests.server.test_cli import ROOT

MORE = 500


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """The ends of a pipe that takes not a byte more."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"." * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def read_until(reading: BufferedReader, end: str) -> list[str]:
    """The lines up to one that ends so, without what had filled the pipe."""
    lines = [reading.readline().decode().lstrip(".").rstrip()]
    while not lines[-1].endswith(end):
        lines.append(reading.readline().decode().rstrip())
    return lines


@pytest.mark.parametrize("blocking", [True, False])
def test_lines_are_dropped_and_counted_once_many_wait(blocking: bool) -> None:
    with full_pipe() as (descriptor, writing), open(descriptor, "rb", closefd=False) as reading:
        os.set_blocking(writing, blocking)
        handler = QueueHandler(writing)

        def note(said: object) -> None:
            handler.handle(logging.makeLogRecord({"msg": str(said)}))

        note("in the thread's hands")
        eventually(handler._lines.empty, "the thread waits for the reader")
        for number in range(MOST_LINES + MORE):
            note(number)
        handler.flush()  # a second at most
        note("of no use either, while so many wait")
        lines = read_until(reading, str(MOST_LINES - 1))
        assert lines == ["in the thread's hands", *map(str, range(MOST_LINES))]
        handler.flush()
        note("again")
        assert read_until(reading, "again") == [
            f"{MORE} log lines were dropped: they were not read as fast as they came",
            "1 log lines were dropped: they were not read as fast as they came",
            "again",
        ]


def test_nothing_is_lost_at_the_end_of_a_process() -> None:
    """In the order of the records, and an error's last word after them."""
    code = (
        "import logging; from server.observability import logs, writing\n"
        "logs.configure('info', 'text')\n"
        "for number in range(5000): logging.warning('line %d', number)\n"
        "writing.say_last('the last')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = ended.stderr.splitlines()
    assert [int(line.rpartition(" ")[2]) for line in lines[:-1]] == list(range(5000))
    assert lines[-1] == "the last"


def test_a_server_whose_log_nobody_reads_serves_and_ends(bundle_folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "server",
        "serve",
        str(bundle_folder),
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (
        full_pipe() as (reading, writing),
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=writing) as process,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):

        def ready() -> bool:
            assert process.poll() is None
            try:
                return client.get("/readyz").status_code == 200
            except httpx.ConnectError:
                return False

        try:
            eventually(ready, "it is ready")
            for _ in range(50):
                assert client.post("/generate", json=OK).status_code == 200
                assert client.get("/healthz", timeout=10.0).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
        os.set_blocking(reading, False)
        assert re.fullmatch(rb"\.+", os.read(reading, 2**20)), "the pipe was not full"


def test_a_start_that_fails_ends_although_nobody_reads_why() -> None:
    command = [sys.executable, "-m", "server", "serve", "no-such-model", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with full_pipe() as (_, writing):
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, stderr=writing, timeout=PATIENCE, check=False
        )
        assert ended.returncode == 2
