"""Passes as recorded graphs of a device, which one call replays: launched one by one, their thousand
operations would take longer than they compute.

    rows ─▶ static index buffer ─▶ [graph: gather from slots → compute → scatter] × chunks of the pass

A graph is recorded for a kind of pass and a number of rows, when it first runs. Its inputs and results keep
their memory. Where bytes are promised, a pass is cut into chunks of one size, so that each image goes through
the same graph whatever comes with it; else the pass is one chunk of the scheduler's bucket.

Shapes: S rows of a chunk, idle ones included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dd_core.engine.ahead import NoiseAhead
from dd_core.engine.runner import NOBODY, EagerRunner, moved
from dd_core.noise import Key
from dd_core.plan import Plan
from dd_core.sampling import Sampler, TeacherRun, chosen_tokens, decode, renoise, student_jump

Replay = Callable[[], object]

# Rows of every chunk where bytes are promised. A chunk of one image cannot depend on another; chunks of a
# teacher's batch keep keys and values, and graphs, of their own: few large ones, in part idle, cost less.
EXACT_ROWS = {"student": 1, "decode": 1, "teacher": 8}
# A raster teacher has as many steps as tokens: as graphs they would take more memory than they are worth.
_MOST_STEPS = 32
# Chunks of teacher batches that are over, kept for the next: their graphs and their memory.
_MOST_SPARE = 8


class Graphs(Protocol):
    """Records functions as graphs, in lanes that may run at the same time."""

    lanes: int

    def record(self, function: Callable[[], None], lane: int) -> Replay | None:
        """Run a function that may be run again, and record it: then what it made is made, and the result runs
        it once more on the same memory. None where nothing can be recorded now: it ran all the same.
        """
        ...

    def on(self, lane: int) -> AbstractContextManager[object]:
        """A context in which the lane computes, after all that was asked for outside of lanes."""
        ...

    def join(self) -> None:
        """Let what is asked for from now on wait for all lanes."""
        ...


class Row(NamedTuple):
    """A row of a student's pass: where its image is, its step, and the first block that stays continuous."""

    slot: int
    step: int = 0
    split: int = 0


def chunks_of(rows: Sequence[Row], exact: int | None, bucket: int) -> list[list[Row]]:
    """Cut a pass: rows of one step and split by `exact`, or all of them (None) filled up to `bucket`."""
    if exact is None:
        return [_filled(rows, max(bucket, len(rows)))]
    ordered = [list(same) for _, same in groupby(sorted(rows, key=lambda r: r[1:]), lambda r: r[1:])]
    return [_filled(same[i : i + exact], exact) for same in ordered for i in range(0, len(same), exact)]


def _filled(rows: Sequence[Row], size: int) -> list[Row]:
    return [*rows, *[rows[-1]._replace(slot=NOBODY)] * (size - len(rows))]


class _Pass(NamedTuple):
    """A recorded pass: its static rows `[3, S]`, and what it makes, also static."""

    rows_3S: Tensor
    made: tuple[Tensor, ...]
    replay: Replay


@dataclass(eq=False)
class _Chunk:
    """A chunk of a teacher's batch: its run, and a graph a step with the cache's length after it."""

    run: TeacherRun
    lane: int
    replays: dict[int, tuple[Replay, int]]

    def advance(self, graphs: Graphs | None) -> None:
        run, step, before, after = self.run, self.run.step, self.run.cache.length, list[int]()

        def compute() -> None:
            run.cache.length = before
            run.compute(step)
            after[:] = [run.cache.length]

        if graphs is None:
            compute()
        elif step in self.replays:
            replay, run.cache.length = self.replays[step]
            replay()
        else:
            recorded = graphs.record(compute, self.lane)
            [run.cache.length] = after  # also where recording failed half-way
            if recorded is not None:
                self.replays[step] = recorded, run.cache.length
        run.count()


_Like = tuple[Plan, int, int]  # of chunks that can take each other's place: plan, segment, rows


class GraphRunner(EagerRunner):
    """A `Runner` that replays graphs. Marginals, which have no model, run as they do without."""

    def __init__(self, sampler: Sampler, graphs: Graphs, capacity: int) -> None:
        # Equal shapes keep the bytes here, so nothing is padded in between.
        super().__init__(replace(sampler, exact=False), capacity)
        self._exact, self._graphs = sampler.exact, graphs
        self._passes: dict[tuple[object, ...], _Pass] = {}
        self._grown = 0  # of the slots that the passes hold
        self._batches: dict[int, tuple[_Like, list[_Chunk]]] = {}
        self._spare: list[tuple[_Like, _Chunk]] = []
        self._noise = NoiseAhead(sampler.layout, sampler.codebook_VC.shape[1])

    @property
    def held(self) -> set[int]:
        return super().held | self._batches.keys()

    def foresee(self, keys: Sequence[Key]) -> None:
        self._noise.begin(keys)

    def noise(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        return self._noise.take(keys)

    @torch.inference_mode()
    def advance(
        self, numbers: Sequence[int], segments: Sequence[int], bucket: int, batch: int | None
    ) -> None:
        plans = [self._plans[number] for number in numbers]
        actor = plans[0].segments[segments[0]].actor
        if actor == "student":
            at = zip(numbers, plans, segments, strict=True)
            rows = [
                Row(self.slots.row(number), plan.segments[segment].start, plan.first_continuous)
                for number, plan, segment in at
            ]
            self._run("student", rows, bucket, self._jump)
        elif actor == "teacher":
            assert batch is not None, "a teacher's batch has a number"
            self._teacher(numbers, (plans[0], segments[0], self._size("teacher") or bucket), batch)
        else:
            super().advance(numbers, segments, bucket, batch)

    @torch.inference_mode()
    def decode(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        # In order: rows are alike but for their slot.
        rows, found = [Row(self.slots.row(number)) for number in numbers], list[tuple[Tensor, ...]]()
        self._run("decode", rows, _power(len(rows)), self._decode, found)
        pixels, good = (torch.cat(parts)[: len(rows)] for parts in zip(*found, strict=True))
        return pixels.cpu(), good.cpu()

    def drop(self, numbers: Sequence[int]) -> None:
        super().drop(numbers)
        for number in numbers:
            if number in self._batches:
                self._put_by(*self._batches.pop(number))

    def recover(self, batch: int | None) -> None:
        super().recover(batch)
        if batch is not None:
            self._batches.pop(batch, None)
        self._spare.clear()

    def _size(self, kind: str) -> int | None:
        return EXACT_ROWS[kind] if self._exact else None

    def _run(
        self,
        kind: str,
        rows: Sequence[Row],
        bucket: int,
        body: Callable[..., tuple[Tensor, ...]],
        found: list[tuple[Tensor, ...]] | None = None,
    ) -> None:
        """Replay the chunks of a pass, lanes in turn; copies of what they make go to `found`, in order."""
        if self._grown != self.slots.grown:  # the graphs hold arrays that are no longer used
            self._passes.clear()
            self._grown = self.slots.grown
        chunks = chunks_of(rows, self._size(kind), bucket)
        rows_N3S = moved(torch.tensor(chunks), self.sampler.device).transpose(1, 2).contiguous()
        for number, (chunk, rows_3S) in enumerate(zip(chunks, rows_N3S, strict=True)):
            lane = number % self._graphs.lanes
            _, steps, splits = zip(*chunk, strict=True)
            chosen = chosen_tokens(self.sampler.layout, steps, splits)
            with self._graphs.on(lane):
                key = kind, len(chunk), chosen.start, chosen.stop
                made = self._replayed(key, lane, rows_3S, partial(body, chosen=chosen))
                if found is not None:
                    found.append(tuple(t.clone() for t in made))
        self._graphs.join()

    def _replayed(
        self,
        key: tuple[object, ...],
        lane: int,
        rows_3S: Tensor,
        body: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        known = self._passes.get((*key, lane))
        if known is not None:
            known.rows_3S.copy_(rows_3S)
            known.replay()
            return known.made
        static_3S, made = rows_3S.clone(), list[Tensor]()

        def compute() -> None:
            made[:] = body(static_3S)

        replay = self._graphs.record(compute, lane)
        if replay is not None:
            self._passes[*key, lane] = _Pass(static_3S, tuple(made), replay)
        return tuple(made)

    def _jump(self, rows_3S: Tensor, chosen: slice) -> tuple[Tensor, ...]:
        student = self.sampler.student
        assert student is not None
        slot_S, step_S, split_S = rows_3S.unbind()
        x_SLC, cond, noise_SLC, _ = self.slots.gather(slot_S)
        x_SLC = renoise(x_SLC, noise_SLC, step_S, student.block_L)
        codebook = self.sampler.codebook_VC
        self.slots.scatter(slot_S, student_jump(student, codebook, x_SLC, cond, step_S, split_S, chosen))
        return ()

    def _decode(self, rows_3S: Tensor, chosen: slice) -> tuple[Tensor, ...]:
        del chosen  # of no logits
        return decode(self.sampler, self.slots.x_NLC.index_select(0, rows_3S[0]))

    def _teacher(self, numbers: Sequence[int], key: _Like, batch: int) -> None:
        if batch not in self._batches:
            self._batches[batch] = key, self._begin(numbers, key)
        _, chunks = self._batches[batch]
        graphs = self._graphs if self.sampler.layout.num_blocks <= _MOST_STEPS else None
        for chunk in chunks:
            with self._graphs.on(chunk.lane):
                chunk.advance(graphs)
        self._graphs.join()
        if chunks[0].run.done:
            codes_BLC = torch.cat([chunk.run.codes() for chunk in chunks])[: len(numbers)]
            self.slots.scatter(self.slots.index(numbers), codes_BLC)
            self._put_by(*self._batches.pop(batch))

    def _begin(self, numbers: Sequence[int], key: _Like) -> list[_Chunk]:
        plan, segment, size = key
        chunks = []
        for number, first in enumerate(range(0, len(numbers), size)):
            some = numbers[first : first + size]
            given = self.slots.gather(self.slots.index(some, size - len(some)))
            lane = number % self._graphs.lanes
            spare = next((c for k, c in self._spare if k == key and c.lane == lane), None)
            if spare is None:
                spare = _Chunk(TeacherRun(self.sampler, plan, plan.segments[segment], *given), lane, {})
            else:
                self._spare.remove((key, spare))
                spare.run.restart(*given)
            chunks.append(spare)
        return chunks

    def _put_by(self, key: _Like, chunks: Sequence[_Chunk]) -> None:
        self._spare = [*self._spare, *((key, chunk) for chunk in chunks)][-_MOST_SPARE:]


def _power(count: int) -> int:
    """The next power of two: pictures of a pass are decoded in as few shapes as passes have."""
    return 1 << (count - 1).bit_length()
