"""Find models in a process of its own, which can be ended.

    find_apart ─ source ─▶ process: find, which may fetch gigabytes ─ the models │ DDError ─▶

A thread that waits for a hub, or reads what somebody made up, cannot be stopped; a process can.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

from dd_core.errors import DDError
from server.devices.pipe import MessagePipe
from server.devices.sockets import settle_socket_folder
from server.errors import ComputeError
from server.models.catalog import ServedModel
from server.observability import logs
from server.settings import Settings

log = logging.getLogger("dd_server")
Find = Callable[[str], ServedModel]
Source = TypeVar("Source")
Found = TypeVar("Found")
_processes = multiprocessing.get_context("forkserver")


async def find_apart(find: Callable[[Source], Found], source: Source, settings: Settings) -> Found:
    """Return what `find` does with `source`; all three can be pickled. Cancelled, its process is killed.

    Raises:
        DDError: as `find` does.
        ComputeError: it has a bug, or the process died.
    """
    settle_socket_folder()
    found: asyncio.Future[Found | DDError] = asyncio.get_running_loop().create_future()

    def receive(answer: Found | DDError | None) -> None:
        if not found.done():
            found.set_result(answer or ComputeError(f"the process that looked for {source!r} died"))

    ours, theirs = _processes.Pipe()
    arguments = (theirs, find, source, settings.log_level, settings.log_format)
    process = _processes.Process(target=_main, args=arguments, name="dd-find", daemon=True)
    await asyncio.to_thread(process.start)
    theirs.close()
    try:
        pipe = await MessagePipe.open(ours, receive, lambda: receive(None))
        try:
            answer = await found
        finally:
            pipe.close()
    finally:
        process.kill()
    if isinstance(answer, DDError):
        raise answer
    return answer


def _main(
    connection: Connection, find: Callable[[Source], Found], source: Source, log_level: str, log_format: str
) -> None:
    """The process: one answer, or its end as soon as nobody waits for it."""
    logs.configure(log_level, log_format)  # type: ignore[arg-type]
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    answer: Found | DDError
    try:
        answer = find(source)
    except DDError as error:
        answer = error
    except Exception:
        log.exception("looking for %s failed", source)
        answer = ComputeError("looking for the model failed; the server's log says why")
    logging.shutdown()
    connection.send(answer)


def _end_with(connection: Connection) -> None:
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(0)
