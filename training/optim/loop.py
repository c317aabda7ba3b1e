"""The loop that every training stage shares: progress, log, curve, checkpoints, exact resume.

A stage is a `Stage`: modules and optimizers by name, and `update(step)`, which does one
optimisation step and returns figures to log. Nothing random outlives a step: the loop seeds
torch with (seed, step) before each update, and batches are functions of the step (`Batches`),
so a run that was killed and resumed gives the same weights as one that was not. A stage whose
number of steps has grown goes on by the longer run's schedule from where it is. Of several ranks each
draws for the whole batch and takes its rows, so neither do the draws depend on their number.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from torch import Tensor

from dd_core.noise import stream_seed
from training import parallel
from training.mismatch import refuse_mismatch
from training.optim.events import Events
from training.optim.progress import Pace, figures_of, read_journal, record_of

log = logging.getLogger("dd_train")


class HasState(Protocol):
    """A part of a checkpoint: modules, optimizers, averages."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass
class Stage:
    """One training stage.

    Args:
        name: names the checkpoint, the log and the curve.
        steps: number of updates.
        parts: everything that a checkpoint must hold to go on exactly.
        update: one optimisation step; returns scalar tensors to log.
        batches: of what the updates are.
        preview: writes pictures of the present state (a sample grid) to the path it is given.
        config: settings that a checkpoint must agree with to be resumed.
    """

    name: str
    steps: int
    parts: Mapping[str, HasState]
    update: Callable[[int], dict[str, Tensor]]
    batches: Batches
    preview: Callable[[Path], None] | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Callback:
    """A call of every rank after each `every` updates (0 = never); rank 0 has written the checkpoint by then.

    It gets the number of updates made, and gets it again where the stage goes on from there: a call that was
    killed is made good, so one that came back must do no harm the second time.
    """

    every: int
    call: Callable[[int], None]
    at_end: bool = False

    def due(self, done: int, steps: int) -> bool:
        """True after `done` of `steps` updates that it is for."""
        return self.every > 0 < done and (done % self.every == 0 or (self.at_end and done == steps))


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up of the decay.

    decay at update i is min(rate, (1 + i) / (10 + i)), so that a short run is not an average of
    its own initialisation.
    """

    def __init__(self, module: torch.nn.Module, rate: float) -> None:
        self.rate = rate
        self.updates = 0
        self.average = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        decay = min(self.rate, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)
            else:
                self.average[key].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.updates = state["updates"]
        for key, value in state["average"].items():
            self.average[key].copy_(value)


@dataclass(frozen=True)
class Batches:
    """Indices of the batch at any step: a fresh permutation of `size` items every epoch."""

    size: int
    batch: int
    seed: int

    @property
    def count(self) -> int:
        """Items of a batch: fewer than `batch` where there are no more."""
        return min(self.size, self.batch)

    @property
    def per_epoch(self) -> int:
        return max(1, self.size // self.batch)

    def at(self, step: int) -> Tensor:
        """`[batch]` int64 indices; depends on nothing but (seed, step)."""
        epoch, place = divmod(step, self.per_epoch)
        cached = _permutations.get(self)
        if cached is None or cached[0] != epoch:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, epoch, "batches"))
            cached = (epoch, torch.randperm(self.size, generator=generator))
            _permutations[self] = cached
        return cached[1][place * self.batch : (place + 1) * self.batch]


_permutations: dict[Batches, tuple[int, Tensor]] = {}


def one_cycle(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Learning rate: linear rise over `warmup` of the run, cosine fall to 2% of the peak."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def update_at(optimizer: torch.optim.Optimizer, factor_of_peak: float) -> None:
    """One update at the schedule's factor of every group's `peak` (set at construction); clears gradients."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor_of_peak
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def plain(value: Any) -> Any:
    """Settings as JSON and checkpoints have them: tuples are lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def run_stage(
    stage: Stage,
    out: Path,
    *,
    seed: int,
    log_every: int = 20,
    save_every: int = 200,
    preview_every: int = 1000,
    stop_after: int | None = None,
    tensorboard: bool = False,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Runs a stage to its end, from its last checkpoint if there is one; returns the last step.

    Writes to `out`: `NAME.pt` (checkpoint, replaced atomically), `NAME.jsonl` (one line a
    logged step), `NAME-loss.png` and `NAME-samples.png`; with `tensorboard`, events in `tensorboard/NAME`.
    `stop_after` ends the run early, as a kill would, after that many updates (the next call goes on from
    there). Every rank calls it; rank 0 writes.

    Raises:
        RecipeError: the checkpoint is of other settings, or not the same for all ranks; or TensorBoard's
            writer is not installed.
        RankError: another rank has ended.
    """
    main = parallel.is_main()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, journal = out / f"{stage.name}.pt", out / f"{stage.name}.jsonl"
    first = _resume(stage, checkpoint, journal)
    parallel.agree(first)
    if first == 0:  # the same seed need not give the same bits on another machine
        parallel.send_to_all(_tensors({k: part.state_dict() for k, part in stage.parts.items()}))
    _call(callbacks, first, stage.steps)
    last = stage.steps if stop_after is None else min(stage.steps, first + stop_after)
    recent: list[tuple[int, dict[str, Tensor]]] = []
    events = Events(out / "tensorboard" / stage.name, first) if tensorboard and main else None
    pace = Pace(first, stage.steps, stage.batches.count, stage.batches.per_epoch)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}", table_column=Column()),  # of more lines in a narrow window
    )
    with Progress(*columns, refresh_per_second=2, disable=not main) as bar:
        task = bar.add_task(stage.name, total=stage.steps, completed=first, said="")
        for step in range(first, last):
            torch.manual_seed(stream_seed(seed, step, stage.name))
            recent.append((step, stage.update(step)))
            done = step + 1
            if not main:
                recent.clear()
                _call(callbacks, done, stage.steps)
                continue
            if done % log_every == 0 or done == last:
                figures = _mean(recent)
                progress = pace.at(done)
                record = record_of(progress, figures)
                with journal.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                if events:
                    events.figures(record)
                said = f"{progress}: " + " ".join(f"{k}={v:.4g}" for k, v in figures.items())
                bar.update(task, completed=done, said=said)
                if not bar.console.is_terminal:
                    log.info("%s %d/%d %s", stage.name, done, stage.steps, said)
                recent.clear()
            called = any(callback.due(done, stage.steps) for callback in callbacks)
            if done % save_every == 0 or done == last or called:
                _save(stage, checkpoint, done)
            paused = time.perf_counter()
            _call(callbacks, done, stage.steps)
            pace.pause(time.perf_counter() - paused)
            if stage.preview and (done % preview_every == 0 or done == stage.steps):
                stage.preview(out / f"{stage.name}-samples.png")
                if events:
                    events.picture(done, out / f"{stage.name}-samples.png")
    if events:
        events.close()
    if main and journal.exists():
        from training.metrics.plots import loss_curve

        loss_curve(figures_of(read_journal(journal)), out / f"{stage.name}-loss.png")
    parallel.barrier()  # the next call reads the checkpoint
    return last


def _call(callbacks: Sequence[Callback], done: int, steps: int) -> None:
    """Make the calls that are due."""
    for callback in callbacks:
        if callback.due(done, steps):
            callback.call(done)


def _tensors(state: Any) -> Iterator[Tensor]:
    """All tensors inside nested dictionaries and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def _mean(recent: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    keys = {k: None for _, figures in recent for k in figures}
    return {k: float(torch.stack([f[k].detach().float() for _, f in recent if k in f]).mean()) for k in keys}


def _save(stage: Stage, path: Path, step: int) -> None:
    state = {k: part.state_dict() for k, part in stage.parts.items()}
    # One name for all (not `replacing`): a run that is killed often must not fill the disk with halves.
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, "config": stage.config, "parts": state}, temporary)
    temporary.replace(path)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Settings that a stage is not resumed without: all but its number of steps, which may grow."""
    return {
        name: {k: v for k, v in part.items() if k != "steps"} if isinstance(part, dict) else part
        for name, part in config.items()
    }


def _resume(stage: Stage, path: Path, journal: Path) -> int:
    if not path.exists():
        if parallel.is_main():
            journal.unlink(missing_ok=True)
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    step = int(saved["step"])
    # More steps are a longer run of the same stage; fewer than it has made are another.
    made, wanted = (_lasting(c) if step <= stage.steps else c for c in (saved["config"], stage.config))
    refuse_mismatch(path, made, wanted, "choose another --out or remove it")
    for key, part in stage.parts.items():
        part.load_state_dict(saved["parts"][key])
    if parallel.is_main() and journal.exists():
        kept = [line for line in read_journal(journal) if line["step"] <= step]
        journal.write_text("".join(json.dumps(line) + "\n" for line in kept))
    log.info("%s: resumed at step %d", stage.name, step)
    return step
