"""The open loop's sender: a process of its own that keeps to its schedule whatever the server does.

    order (JSON on standard input) → each request at its time → what became of it (JSON on standard output)

No arrival waits for a reply: a request takes a connection that is free, or opens one. Times are seconds
since the schedule's zero.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

from benchmarks.client import Call, IdleClosedError, LeanConnection, Record

_PAUSE = 0.1  # seconds before a closed loop tries again after anything but a 200


class Sender:
    """The connections to one server.

    Args:
        zero: the schedule's zero on the event loop's clock.
    """

    def __init__(self, host: str, port: int, zero: float) -> None:
        self._address = (host, port)
        self._zero = zero
        self._idle: list[LeanConnection] = []
        self.opened = 0

    def now(self) -> float:
        """Seconds since the schedule's zero."""
        return asyncio.get_running_loop().time() - self._zero

    async def send(self, record: Record, call: Call) -> None:
        """Send at once, on a connection that is free or on a new one, and fill the record."""
        connection = self._idle.pop() if self._idle else LeanConnection(*self._address)
        new = connection.sent is None
        try:
            reply = await connection.exchange(call)
        except IdleClosedError:
            await connection.aclose()
            await self.send(record, call)
            return
        except ValueError:
            record.done, record.failure = self.now(), "no HTTP/1.1 reply with a length"
        except (OSError, EOFError) as error:
            record.failure = type(error).__name__ if connection.sent is None else "connection lost"
        else:
            record.done, record.status = self.now(), reply.status
            if reply.status == 200 and not reply.content.startswith(call.starts_with):
                record.failure = "unexpected body"
        finally:
            if connection.sent is not None:
                record.sent = record.sent or connection.sent - self._zero
                self.opened += new
        if record.failure is None and connection.open:
            self._idle.append(connection)
        else:
            await connection.aclose()

    async def repeat(self, patterns: Iterator[tuple[Record, Call]], ended: list[Record]) -> None:
        """Keep the server busy as one client of a closed loop, until cancelled."""
        for like, call in patterns:
            record = Record(like.kind, self.now())
            await self.send(record, call)
            ended.append(record)
            if not record.good:
                await asyncio.sleep(_PAUSE)


def _requests(order: dict[str, Any], arrivals: list[list[Any]]) -> list[tuple[Record, Call]]:
    """`[time, class, body]` → requests that only have to be sent."""
    return [(Record(kind, at), Call.generate(body, order["accept"][kind])) for at, kind, body in arrivals]


async def _obey(order: dict[str, Any]) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    arrivals, patterns = (_requests(order, order[key]) for key in ("arrivals", "background"))
    sender = Sender(order["host"], order["port"], loop.time() + order["lead"])
    repeated, ended = itertools.cycle(patterns), list[Record]()
    background = [loop.create_task(sender.repeat(repeated, ended)) for _ in range(order["clients"])]
    await asyncio.sleep(-sender.now())
    cpu = time.process_time()
    tasks = []
    for record, call in arrivals:
        if (ahead := record.at - sender.now()) > 0:
            await asyncio.sleep(ahead)
        tasks.append(loop.create_task(sender.send(record, call)))
    if tasks:  # one without a reply by then is told as it is
        await asyncio.wait(tasks, timeout=order["patience"])
    found = {
        "records": [astuple(record) for record, _ in arrivals],
        "background": [astuple(record) for record in ended],
        "connections": sender.opened,
        "seconds": sender.now(),
        "cpu_seconds": time.process_time() - cpu,
    }
    for task in (*tasks, *background):
        task.cancel()
    return found


def main() -> int:
    """Obey one order."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # in an overload every request that waits has a connection
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    order = json.load(sys.stdin)
    print(json.dumps(asyncio.run(_obey(order))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
