"""The rule by which Kubernetes' HorizontalPodAutoscaler (and so KEDA) sets a number of pods: pure numbers.

    metric ─▶ proposal ─▶ stabilised (scale-down: the most of the last minutes) ─▶ policies ─▶ bounds

As in kubernetes/pkg/controller/podautoscaler: `replica_calculator.go` and `horizontal.go`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance
SYNC_SECONDS = 15.0  # --horizontal-pod-autoscaler-sync-period


class Policy(NamedTuple):
    """At most `percent` of the pods, or `pods`, whichever is more, within `seconds`."""

    percent: float
    pods: int
    seconds: float


def by_pods(current: int, measured: int, average: float, target: float) -> int:
    """Propose a number of pods by a metric of each (type Pods).

    Args:
        measured: pods that have the metric; the others, which start, count so that they damp the change.
        average: of those that have it.
    """
    if measured == 0:
        return current
    ratio = average / target
    missing = current - measured
    if not missing:
        return current if abs(ratio - 1) <= TOLERANCE else math.ceil(ratio * current)
    assumed = target if ratio < 1 else 0.0
    damped = (average * measured + assumed * missing) / (target * current)
    if abs(damped - 1) <= TOLERANCE or (damped > 1) != (ratio > 1):
        return current
    proposal = math.ceil(damped * current)
    return current if (damped < 1) != (proposal < current) else proposal


def by_total(current: int, total: float, target: float) -> int:
    """Propose a number of pods by a sum over all (type External, AverageValue), as KEDA has it."""
    within = abs(total / (target * current) - 1) <= TOLERANCE
    return current if within else math.ceil(total / target)


@dataclass(eq=False)
class Autoscaler:
    """The number of pods, changed at each `sync`."""

    replicas: int
    least: int
    most: int
    up: Policy
    down: Policy
    stabilization: float  # seconds; of scale-down

    _proposals: deque[tuple[float, int]] = field(default_factory=deque, init=False)
    _changes: list[tuple[float, int]] = field(default_factory=list, init=False)

    def sync(self, now: float, proposals: Iterable[int]) -> int:
        """Follow the highest of the proposals as far as is allowed; return the new number of pods."""
        wanted = max(proposals)
        self._proposals.append((now, wanted))
        while self._proposals[0][0] < now - self.stabilization:
            self._proposals.popleft()
        if wanted < self.replicas:
            wanted = min(self.replicas, max(proposal for _, proposal in self._proposals))
        if wanted > self.replicas:
            began = self._before(now, self.up.seconds)
            limit = max(math.ceil(began * (1 + self.up.percent / 100)), began + self.up.pods)
            wanted = max(self.replicas, min(wanted, limit))
        elif wanted < self.replicas:
            began = self._before(now, self.down.seconds)
            limit = min(int(began * (1 - self.down.percent / 100)), began - self.down.pods)
            wanted = min(self.replicas, max(wanted, limit))
        wanted = min(self.most, max(self.least, wanted))
        if wanted != self.replicas:
            self._changes.append((now, wanted - self.replicas))
            self.replicas = wanted
        return wanted

    def _before(self, now: float, seconds: float) -> int:
        """The number of pods so many seconds ago."""
        return self.replicas - sum(change for at, change in self._changes if at > now - seconds)
