"""The run of a command: its recipe chosen, its folder held, its log begun."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from dd_core.errors import RecipeError
from training import parallel
from training.lock import locked
from training.options import Options
from training.presets import presets
from training.recipes.choose import choose_recipe
from training.recipes.saved import agreed, remembered
from training.run import WHOLE, Job, Run


@contextmanager
def prepared(
    options: Options, *, stop_after: int | None = None, shard: str | None = None, together: bool = False
) -> Iterator[Run]:
    """Give the run of a command. No other command may use its folder meanwhile, which remembers its recipe.

    Args:
        shard: the part of a set of pairs that this job makes. Jobs of one set have the folder together, and
            one recipe.
        together: connect the processes that torchrun started, of which rank 0 holds the folder.

    Raises:
        RecipeError: settings that cannot be, a folder in use, or a run that was begun with other settings.
    """
    device, out = parallel.pick_rank_device(options.device), options.folder
    job = Job.of(shard or "0/1")
    several = shard is not None and job.of_rank() != WHOLE
    overrides = options.overrides or ()
    if several:
        _refuse_growth(overrides)
    with parallel.joined(device) if together else nullcontext(), ExitStack() as kept:
        _log_to()
        with parallel.in_turn():
            if together and not parallel.is_main():  # rank 0 has written down what it chose
                settings = choose_recipe(out, None)
            else:
                settings = choose_recipe(out, options.recipe, overrides, options.data, options.size)
            presets(settings)  # plans that there are not are refused now, not after the training
            out.mkdir(parents=True, exist_ok=True)
            if several or parallel.is_main():
                kept.enter_context((agreed if several else remembered)(out, settings))
        _set_up(out, device, options.threads)
        yield Run(settings, out, device, stop_after, job)


@contextmanager
def held(out: Path, device: torch.device, threads: int) -> Iterator[None]:
    """Hold a folder that is of no run, by rank 0 of several processes, and log into it.

    Raises:
        RecipeError: another process works in it.
    """
    with ExitStack() as kept:
        with parallel.in_turn():
            out.mkdir(parents=True, exist_ok=True)
            if parallel.is_main():
                kept.enter_context(locked(out))
        _set_up(out, device, threads)
        yield


def _refuse_growth(overrides: Sequence[str]) -> None:
    """Refuse `+value` to one of several jobs: each would add to what those before it have made of it."""
    for field, _, value in (item.partition("=") for item in overrides):
        if value.startswith("+"):
            raise RecipeError(
                f"jobs that share a folder cannot each add to {field}: give all of them its new value, not "
                f"{value}",
                param=field,
            )


def _set_up(out: Path, device: torch.device, threads: int) -> None:
    """Set torch's threads, and log into the folder; ranks but the first tell their warnings alone."""
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    _log_to(*([logging.FileHandler(out / "train.log")] if parallel.is_main() else []))


def _log_to(*handlers: logging.Handler) -> None:
    """Log there, and to standard error where that is no terminal, which has progress bars."""
    ours = logging.getLogger("dd_train")
    for old in list(ours.handlers):
        ours.removeHandler(old)
        old.close()
    main = parallel.is_main()
    for handler in (*handlers, *([] if main and sys.stderr.isatty() else [_Stderr()])):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        ours.addHandler(handler)
    ours.setLevel(logging.INFO if main else logging.WARNING)


class _Stderr(logging.Handler):
    """Writes to what is standard error at that moment: a captured stream may be gone by the next line."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()
