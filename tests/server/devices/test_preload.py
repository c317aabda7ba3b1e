"""What a device process finds when it starts."""

from __future__ import annotations

import gc
import sys
from multiprocessing.connection import Connection

from tests.server.helpers import processes


def _tell(connection: Connection) -> None:
    loaded = {"torch._dynamo", "server.devices.process"} <= set(sys.modules)
    connection.send((loaded, gc.get_freeze_count(), len(gc.get_objects())))


def test_a_device_process_does_not_collect_what_was_imported_before_it() -> None:
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_tell, args=(theirs,))
    process.start()
    loaded, frozen, collected = ours.recv()
    process.join()
    assert loaded
    assert frozen > 2 * collected
