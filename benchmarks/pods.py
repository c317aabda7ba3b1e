"""A fleet of pods on a simulated clock: each has the server's own scheduler, and passes of measured cost.

    arrivals ─ a pod at random ─▶ Scheduler.admit ─▶ next_batch ─ its cost later ─▶ finish ─▶ a latency

A balancer that picks at random, as kube-proxy does, splits a Poisson stream into independent ones. So of a
large fleet only one pod in `each` is simulated, with its share of the requests.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from dd_core.noise import NoiseKey
from dd_core.plan import Plan
from server.scheduling.costs import CostTable, Work
from server.scheduling.jobs import Batch, Job
from server.scheduling.scheduler import Scheduler

MODEL = "simulated"
_DECODE = Work(MODEL, "decode")
_KEY = NoiseKey(0, 0)  # nothing is computed


class FixedCosts(CostTable):
    """Costs that stay as they were restored: here every pass takes what it should."""

    def observe(self, work: Work, bucket: int, seconds: float) -> None:
        """Learn nothing."""

    def observe_gap(self, seconds: float, most: float = math.inf) -> None:
        """Learn nothing."""


class Arrival(NamedTuple):
    """A request: the plan of its images, and how many they are."""

    plan: Plan
    images: int


class Sample(NamedTuple):
    """The metrics of a pod that Prometheus scraped."""

    waiting: int  # dd_queue_depth
    backlog: float  # dd_backlog_seconds
    busy: float  # dd_device_busy_seconds_total


class Reply(NamedTuple):
    """What became of a request; no latency = refused, since the queue was full."""

    at: float
    plan: str
    latency: float | None


@dataclass(eq=False)
class Pod:
    """One server with one device."""

    costs: FixedCosts
    queue_size: int
    ready: float  # time from which it gets requests
    running: Batch | None = None
    cost: float = 0.0  # seconds of the pass that runs, with its decoding
    ends: float = 0.0  # of the pass that runs
    busy: float = 0.0  # seconds of passes that have ended
    leaving: bool = False  # it gets no more requests

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.costs, self.queue_size)

    def sample(self, now: float) -> Sample:
        """Return its metrics."""
        left = max(0.0, self.ends - now) if self.running is not None else 0.0
        return Sample(self.scheduler.depth, self.scheduler.ahead(left), self.busy - min(left, self.cost))


@dataclass(eq=False)
class Fleet:
    """Pods, and the events of all of them in the order of time.

    Args:
        load: the requests a second of the whole fleet at a time, and a request of that time.
        peak: the most that `load` says.
        start_seconds: from a pod's creation until it is ready.
        each: pods for which one is simulated.
    """

    costs: FixedCosts
    load: Callable[[float], float]
    draw: Callable[[float, random.Random], Arrival]
    peak: float
    start_seconds: float
    each: float = 1.0
    seed: int = 0
    queue_size: int = 256

    now: float = field(default=0.0, init=False)
    size: int = field(default=0, init=False)  # pods of the whole fleet
    pod_seconds: float = field(default=0.0, init=False)
    pods: list[Pod] = field(default_factory=list, init=False)  # that get requests, or start
    replies: list[Reply] = field(default_factory=list, init=False)
    admitted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._order = itertools.count()
        self._passes: list[tuple[float, int, Pod]] = []  # heap: ends of passes
        self._leaving: list[Pod] = []

    def resize(self, size: int, *, started: bool = False) -> None:
        """Set the number of pods of the whole fleet; those that start are the first to go, then the newest.

        Args:
            started: new ones are ready at once.
        """
        simulated, self.size = math.ceil(size / self.each), size
        while len(self.pods) > simulated:
            pod = self.pods.pop()
            pod.leaving = True
            if pod.running is not None:
                self._leaving.append(pod)
        while len(self.pods) < simulated:
            ready = self.now if started else self.now + self.start_seconds
            self.pods.append(Pod(self.costs, self.queue_size, ready))

    def samples(self) -> dict[Pod, Sample]:
        """The metrics of the pods that are ready."""
        return {pod: pod.sample(self.now) for pod in self.pods if pod.ready <= self.now}

    def run(self, until: float) -> None:
        """Let time pass, with requests arriving."""
        arrival = self._next_arrival()
        while True:
            ends = self._passes[0][0] if self._passes else math.inf
            if min(ends, arrival) > until:
                break
            if ends <= arrival:
                self._end_pass()
            else:
                self._pass_time(arrival)
                self._arrive()
                arrival = self._next_arrival()
        self._pass_time(until)

    def drain(self) -> None:
        """Finish all that waits, without new requests."""
        while self._passes:
            self._end_pass()

    def _next_arrival(self) -> float:
        """The next of a Poisson process whose rate changes, by thinning one of its highest rate."""
        at, share = self.now, len(self.pods) / self.size
        while True:
            at += self._random.expovariate(self.peak * share)
            if self._random.random() * self.peak <= self.load(at):
                return at

    def _pass_time(self, now: float) -> None:
        # Pods that leave count until their work is done.
        counted = self.size + len(self._leaving) * self.size / max(1, len(self.pods))
        self.pod_seconds += counted * (now - self.now)
        self.now = now

    def _arrive(self) -> None:
        plan, images = self.draw(self.now, self._random)
        job = Job(MODEL, plan, 0, (_KEY,) * images, self.now)
        ready = bisect_right(self.pods, self.now, key=attrgetter("ready"))  # the oldest come first
        pod = self.pods[self._random.randrange(ready)] if ready else None
        left = 0.0
        if pod is not None and pod.running is not None:
            left = max(0.0, pod.ends - self.now)
        if pod is None or pod.scheduler.admit(job, self.now, left) is not None:
            self.replies.append(Reply(self.now, plan.name, None))
            return
        self.admitted += 1
        self._begin_pass(pod)

    def _begin_pass(self, pod: Pod) -> None:
        if pod.running is not None:
            return
        pod.scheduler.dropped.clear()
        pod.running = pod.scheduler.next_batch()
        if pod.running is None:
            return
        pod.cost = pod.scheduler.expected(pod.running)
        pod.ends, pod.busy = self.now + pod.cost + self.costs.gap, pod.busy + pod.cost
        heapq.heappush(self._passes, (pod.ends, next(self._order), pod))

    def _end_pass(self) -> None:
        ends, _, pod = heapq.heappop(self._passes)
        self._pass_time(ends)
        batch, pod.running = pod.running, None
        assert batch is not None, "a pass that nobody began"
        decoding = len(batch.decoding)
        decode = self.costs.seconds(_DECODE, self.costs.bucket_for(decoding)) if decoding else 0.0
        for job in pod.scheduler.finish(batch, pod.cost - decode, decode, ends):
            self.replies.append(Reply(job.submitted, job.plan.name, ends - job.submitted))
        self._begin_pass(pod)
        if pod.leaving and pod.running is None:
            self._leaving.remove(pod)


def latencies(replies: Sequence[Reply], plan: str | None = None) -> list[float]:
    """The latencies of the requests that were served: of a plan, or all."""
    return [r.latency for r in replies if r.latency is not None and plan in (None, r.plan)]
