"""Points in time between the parts of a computation, without waiting for a GPU between them."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """Now: the clock on a CPU, an event in the stream on CUDA.

    Events do not make the CPU wait between parts, which would hide that it prepares one while the GPU is
    still at the one before. An event that is recorded on an idle stream happens at once, so work on the CPU
    before the first kernel is seen as well.
    """
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Mark, second: Mark) -> float:
    """Seconds between two marks of one device, which `wait_for` has waited for."""
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float) and isinstance(second, float), "marks of two devices"
        return second - first
    return float(first.elapsed_time(second)) / 1e3


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
