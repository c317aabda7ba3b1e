"""A device on a simulated clock, for decisions of the scheduler without a model."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from dd_core.noise import NoiseKey
from dd_core.plan import Plan
from server.scheduling.costs import CostTable, Work, buckets_up_to
from server.scheduling.jobs import Batch, Job
from server.scheduling.scheduler import Refusal, Scheduler

STUDENT_S, TEACHER_S, DECODE_S = 0.010, 0.008, 0.004


def costs(limit: int = 8, plans: Iterable[Plan] = ()) -> CostTable:
    """Passes of constant cost, whatever the batch; decoding image by image."""
    table = CostTable(buckets_up_to(limit))
    for bucket in table.buckets:
        table.observe(Work("tiny", "student"), bucket, STUDENT_S)
        table.observe(Work("tiny", "decode"), bucket, bucket * DECODE_S)
        for plan in plans:
            table.observe(Work("tiny", "teacher", plan.name), bucket, TEACHER_S)
    return table


def job(plan: Plan, at: float = 0.0, count: int = 1, **more: object) -> Job:
    """A request for images of class 3 at a time."""
    return Job("tiny", plan, 3, NoiseKey.of_seed(0, count), at, **more)  # type: ignore[arg-type]


@dataclass
class Simulation:
    """Runs a scheduler: arrivals by time, passes of their cost, everything that happened."""

    scheduler: Scheduler
    arrivals: list[Job] = field(default_factory=list)
    now: float = 0.0
    passes: list[tuple[float, Batch]] = field(default_factory=list)
    done: dict[Job, float] = field(default_factory=dict)
    refused: dict[Job, Refusal] = field(default_factory=dict)
    expired: list[Job] = field(default_factory=list)
    slower: float = 1.0  # time from a pass to the next ÷ what the device says of it

    @classmethod
    def of(cls, arrivals: list[Job], kind: type[Scheduler] = Scheduler, limit: int = 8):
        plans = {job.plan for job in arrivals}
        return cls(kind(costs(limit, plans), 10_000), arrivals)

    def run(self) -> Simulation:
        """To the end of all work."""
        order = itertools.count()
        waiting = [(job.submitted, next(order), job) for job in self.arrivals]
        heapq.heapify(waiting)
        running: tuple[float, Batch, float, float] | None = None
        while waiting or running or self.scheduler.jobs:
            if running is None:
                for late in self.scheduler.expired(self.now):
                    self.scheduler.end(late)
                    self.expired.append(late)
                work = self.scheduler.next_batch()
                if work is not None:
                    seconds, decoding = self._cost(work), len(work.finishing) * DECODE_S
                    running = (self.now + self.slower * (seconds + decoding), work, seconds, decoding)
                    self.passes.append((self.now, work))
            if waiting and (running is None or waiting[0][0] <= running[0]):
                at, _, arriving = heapq.heappop(waiting)
                self.now = max(self.now, at)
                refusal = self.scheduler.admit(arriving, self.now, running[0] - self.now if running else 0.0)
                if refusal is not None:
                    self.refused[arriving] = refusal
            elif running is not None:
                self.now, work, seconds, decoding = running
                running = None
                for complete in self.scheduler.finish(work, seconds, decoding, self.now):
                    self.done[complete] = self.now
        return self

    def latency(self, job: Job) -> float:
        return self.done[job] - job.submitted

    @staticmethod
    def _cost(work: Batch) -> float:
        return {"student": STUDENT_S, "teacher": TEACHER_S, "marginal": 0.001, "decode": 0.0}[work.work.kind]
