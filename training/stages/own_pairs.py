"""Stage (c′): pairs that begin with the tokens of the student that the run was started from."""

from __future__ import annotations

from dd_core.errors import RecipeError
from training.run import Run, load_first_student
from training.stages.pairs import OWN_FOLDER, make_run_pairs


def run(run: Run) -> None:
    """Stage (c'): pairs that begin with the tokens of the student that the run was started from, up to the
    first later training step, and on which the teacher goes on.

    Raises:
        RecipeError: an earlier stage is missing, no student to begin with, or no later training step.
    """
    later = [t for t in run.recipe.distill.train_steps if t]
    if not run.recipe.pairs.own or not later:
        raise RecipeError(
            "own pairs need their number, pairs.own, and a later step in distill.train_steps",
            param="pairs.own",
        )
    make_run_pairs(run, run.out / OWN_FOLDER, load_first_student(run), min(later))
