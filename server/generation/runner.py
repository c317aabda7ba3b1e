"""Run a GenerationRequest: its images as they come, step by step, encoded.

    GenerationRequest ─▶ job of a step ─▶ DevicePool ─▶ pixels ─▶ Encoder ─▶ GeneratedImage
                                        ▲                                                  │
                                        └───────────────── the next step ◀─────────────────┘

A unary reply is a run with one step, whose images come together; a stream has one step or more, and its
images come one by one. Cancellation lives here: to leave the run, however, is to cancel what has not begun.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol, Self

from server.devices.submission import Sampled, Submission
from server.generation.encoder import Encoder, Encoding, GeneratedImage
from server.generation.planner import RefinementStep
from server.generation.request import GenerationRequest
from server.observability.record import RequestRecord
from server.scheduling.jobs import Job


class Devices(Protocol):
    """A place that computes jobs: all of the `DevicePool` that a run knows."""

    def submit(self, job: Job) -> Submission: ...
    def hold(self, model: str) -> None: ...
    def release(self, model: str) -> None: ...


@dataclass(eq=False)
class GenerationRun:
    """The images of one request, by one step after the other; iterate it once, within its `with`.

    Making it submits the first step, so what is refused is refused before the first byte of a reply; to
    leave the `with` cancels what has not begun. Its model stays loaded until then.

    Raises, when it is made or iterated:
        ApiError: a step was refused, or one failed.
    """

    generation: GenerationRequest
    pool: Devices
    encoder: Encoder
    encoding: Encoding
    record: RequestRecord

    def __post_init__(self) -> None:
        self._submission = self._submit(self.generation.steps[0])
        self.record.admitted = True
        self.pool.hold(self.generation.model.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._submission.cancel()
        self.pool.release(self.generation.model.name)

    def _submit(self, step: RefinementStep) -> Submission:
        return self.pool.submit(self.generation.job(step))

    async def __aiter__(self) -> AsyncIterator[GeneratedImage]:
        stage, steps = 0, self.generation.steps
        for step in steps:
            if step is not steps[0]:
                self._submission = self._submit(step)
            async for sampled in self._arrivals():
                for image in await self._encode(sampled, step, stage, last=step is steps[-1]):
                    yield image
            stage += 1 if step.preview is None else 2

    async def _arrivals(self) -> AsyncIterator[list[Sampled]]:
        """Yield the images of a step: one by one as they come for a stream, else all together in order."""
        if self.generation.streamed:
            async for one in self._submission:
                yield [one]
        else:
            yield sorted([one async for one in self._submission], key=attrgetter("index"))

    async def _encode(
        self, sampled: Sequence[Sampled], step: RefinementStep, stage: int, *, last: bool
    ) -> list[GeneratedImage]:
        """Encode what the device made in one go: all final or all previews."""
        generation, encoding, job = self.generation, self.encoding, self._submission.job
        plan, finished = step.plan, sampled[0].last
        if step.preview is not None:
            plan, stage = (step.plan, stage + 1) if finished else (step.preview, stage)
        final = finished and last
        started = time.perf_counter()
        receipts = [generation.receipt(one.index, plan) for one in sampled]
        files = await self.encoder.encode_all([one.pixels for one in sampled], receipts, encoding)
        encoded = time.perf_counter()
        seconds = {
            "queue_ms": job.queue_s,
            "compute_ms": job.compute_s,
            "encode_ms": encoded - started,
            "total_ms": encoded - self.record.arrived,
        }
        times = {name: round(1e3 * value, 3) for name, value in seconds.items()}
        self.record.encoded(
            plan.name,
            encoding.image_format,
            len(files),
            encoded - started,
            streamed=generation.streamed,
            queue_ms=times["queue_ms"],
            compute_ms=times["compute_ms"],
        )
        images = []
        for one, receipt, file in zip(sampled, receipts, files, strict=True):
            newest, (height, width) = generation.keys[one.index].newest, one.pixels.shape[:2]
            image = GeneratedImage(
                one.index, newest.seed, newest.index, plan, stage, final, receipt, width, height, file, times
            )
            images.append(image)
        return images
