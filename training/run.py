"""A run folder: its recipe, where it is, and the weights that stages leave in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dd_core.errors import RecipeError
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer, new_student, new_teacher, new_tokenizer
from training.recipes.settings import Recipe
from training.stages.pairs import Job

M = TypeVar("M", AnyTokenizer, AnyTeacher, AnyStudent)


@dataclass(frozen=True)
class Run:
    """One training run: what to make, where, on what.

    `stop_after` ends a stage early. `job` is the part of the pairs to make, where several jobs share them.
    """

    recipe: Recipe
    out: Path
    device: torch.device
    stop_after: int | None = None
    job: Job = field(default_factory=Job)


def load_tokenizer(run: Run) -> AnyTokenizer:
    """The tokenizer that stage (a) left.

    Raises:
        RecipeError: it has not been trained yet.
    """
    return load(run, new_tokenizer(run.recipe.tokenizer_model), "tokenizer", "tokenizer")


def load_drawing_tokenizer(run: Run) -> AnyTokenizer:
    """The tokenizer that makes pictures: stage (a′)'s, or stage (a)'s where the recipe has no (a′).

    Raises:
        RecipeError: it has not been trained yet.
    """
    if not run.recipe.decoder.steps:
        return load_tokenizer(run)
    return load(run, new_tokenizer(run.recipe.tokenizer_model), "decoder", "decoder")


def load_teacher(run: Run, tokenizer: AnyTokenizer) -> AnyTeacher:
    """The teacher that stage (b) left, of that tokenizer's tokens.

    Raises:
        RecipeError: it has not been trained yet.
    """
    return load(run, new_teacher(run.recipe.model, tokenizer), "teacher", "teacher")


def load_student(run: Run) -> AnyStudent:
    """The student that stage (d) left.

    Raises:
        RecipeError: it has not been trained yet.
    """
    return load(run, new_student(run.recipe.student), "student", "distill")


def load_first_student(run: Run) -> AnyStudent:
    """The student that the run was started from; how many blocks it has is seen from its tensors.

    Raises:
        RecipeError: it was not.
    """
    stack = next(iter(new_student(run.recipe.model).GROWS))
    keys = [key for key in read(run, "first-student", "start") if key.startswith(f"{stack}.")]
    layers = len({key.split(".")[1] for key in keys})
    return load(run, new_student(run.recipe.model.with_layers(layers)), "first-student", "start")


def save(run: Run, name: str, module: nn.Module) -> None:
    """Writes `name.safetensors`."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    save_file(state, str(run.out / f"{name}.safetensors"))


def read(run: Run, name: str, stage: str) -> dict[str, Tensor]:
    """The tensors of `name.safetensors`, which a stage leaves.

    Raises:
        RecipeError: it is not there yet.
    """
    path = run.out / f"{name}.safetensors"
    if not path.exists():
        raise RecipeError(
            f"{path} is not there yet: run `dd-train {stage} --out {run.out}` first", param="out"
        )
    return load_file(path)


def load(run: Run, module: M, name: str, stage: str) -> M:
    """`module` with the weights of `name.safetensors`, frozen, on the run's device.

    Raises:
        RecipeError: it is not there yet.
    """
    module.load_state_dict(read(run, name, stage))
    return module.to(run.device).eval().requires_grad_(False)
