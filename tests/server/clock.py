"""A clock that a test moves, in place of the module `time` of what it tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """`monotonic` and `perf_counter` tell `now`, in seconds."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now
