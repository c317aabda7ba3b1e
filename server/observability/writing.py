"""Writing log lines without ever waiting for whoever reads them.

    logger ─ emit: format ─▶ a queue, bounded ─▶ a daemon thread ─ write ─▶ standard error

A pipe that nobody reads is full after 64 KiB, and a write to it does not return. Here that holds up the
thread alone: when the queue is full too, lines are dropped and counted.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from contextlib import suppress
from queue import SimpleQueue

STDERR = 2
# Lines that wait. After a loss none is taken until half of them are written, so that one line tells of it.
MOST_LINES = 10_000
# Seconds that an end of the process waits for the lines that are left.
_PATIENCE = 1.0


def say_last(text: str) -> None:
    """Write the last line of the process to standard error, waiting a second at most for it to be taken."""
    for handler in logging.root.handlers:
        handler.flush()
    line = f"{text}\n".encode(errors="backslashreplace")
    # Of `sys.stderr` the thread would hold the lock, which the end of the process waits for.
    writing = threading.Thread(target=_write, args=(STDERR, line), daemon=True)
    writing.start()
    writing.join(_PATIENCE)


def _write(descriptor: int, data: bytes) -> None:
    with suppress(OSError):  # whoever read it has left
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # somebody who has the file as well made it so
                select.select([], [descriptor], [])


class QueueHandler(logging.Handler):
    """A handler that leaves the writing to a thread of its own, in the order of the records.

    Args:
        descriptor: of the open file to write to.
    """

    def __init__(self, descriptor: int = STDERR) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._dropped = 0
        threading.Thread(target=self._write_all, name="dd-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line, or drop it."""
        waiting = self._lines.qsize()
        if waiting >= MOST_LINES or (self._dropped and waiting > MOST_LINES // 2):
            self._dropped += 1
            return
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 (of any kind: the arguments do not fit the message, …)
            self.handleError(record)
            return
        self._tell_of_dropped()
        self._lines.put(line)

    def flush(self) -> None:
        """Wait until what was queued is written, for a second at most; called at the end of the process."""
        self._tell_of_dropped()
        written = threading.Event()
        self._lines.put(written)
        written.wait(_PATIENCE)

    def _tell_of_dropped(self) -> None:
        dropped, self._dropped = self._dropped, 0
        if dropped:
            told = {
                "name": "dd_server",
                "levelno": logging.WARNING,
                "levelname": "WARNING",
                "msg": "%d log lines were dropped: they were not read as fast as they came",
                "args": (dropped,),
            }
            self._lines.put(self.format(logging.makeLogRecord(told)))

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
            else:
                _write(self._descriptor, f"{line}\n".encode(errors="backslashreplace"))
