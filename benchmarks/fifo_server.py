"""`dd-server` with a first-come-first-served queue: the baseline of `benchmarks.interference`.

python -m benchmarks.fifo_server serve …      as `python -m server serve …`, but for the scheduler
"""

from __future__ import annotations

from unittest.mock import patch

from server.scheduling.costs import Lane
from server.scheduling.jobs import Job
from server.scheduling.scheduler import Heads, Scheduler


class FifoScheduler(Scheduler):
    """The server's scheduler, but images are due when they arrive, and no lane has a share of the device.

    The oldest request runs to its end; others take part in its passes where these have room. Forecasts are
    not adapted to this order: the baseline is for requests without a deadline, of a plan that they name.
    """

    def _due(self, job: Job, now: float) -> float:  # noqa: ARG002
        return now

    def _choose(self, heads: Heads) -> Lane:
        return min(heads, key=lambda lane: heads[lane][0])


def main() -> None:
    """Run the command of the server."""
    from server.__main__ import main as serve
    from server.devices import pool

    with patch.object(pool, "Scheduler", FifoScheduler):
        serve()


if __name__ == "__main__":
    main()
