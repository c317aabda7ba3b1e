"""Teacher and student of a run, also of a stage that is still in training: its average so far."""

from __future__ import annotations

from typing import TypeVar

import torch

from dd_core.errors import RecipeError
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer, new_student, new_teacher
from training.run import Run, load_student, load_teacher

M = TypeVar("M", AnyTeacher, AnyStudent)


def teacher_of(run: Run, tokenizer: AnyTokenizer) -> AnyTeacher | None:
    """The teacher, as far as it is; None before its first checkpoint.

    Raises:
        RecipeError: it is of another architecture than the recipe's.
    """
    begun = _average(run, new_teacher(run.recipe.model, tokenizer), "teacher")
    return begun or (load_teacher(run, tokenizer) if (run.out / "teacher.safetensors").exists() else None)


def student_of(run: Run) -> AnyStudent | None:
    """The student, as far as it is; None before its first checkpoint.

    Raises:
        RecipeError: it is of another architecture than the recipe's.
    """
    begun = _average(run, new_student(run.recipe.student), "student")
    return begun or (load_student(run) if (run.out / "student.safetensors").exists() else None)


def _average(run: Run, module: M, stage: str) -> M | None:
    path = run.out / f"{stage}.pt"
    if not path.exists():
        return None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    try:
        module.load_state_dict(saved["parts"]["ema"]["average"])
    except RuntimeError:
        raise RecipeError(f"{path} is not of the recipe {run.recipe.name!r}", param="recipe") from None
    return module.to(run.device).eval().requires_grad_(False)
