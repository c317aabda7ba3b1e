"""The models that a run has trained, as one sampler: for evaluation and export."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer
from dd_core.sampling import Sampler
from training.digest import weights_digest
from training.run import (
    Run,
    load_drawing_tokenizer,
    load_student,
    load_teacher,
    load_tokenizer,
    sampler_without_marginals,
)
from training.stages.pairs import marginals, pairs_of

_LARGEST_TABLE = 2**28  # token frequencies; of ImageNet's classes they would be 11 GB and more


def load_models(run: Run) -> tuple[AnyTokenizer, AnyStudent, AnyTeacher]:
    """Every model of the run, for evaluation and export."""
    return load_drawing_tokenizer(run), load_student(run), load_teacher(run, load_tokenizer(run))


def sampler_of(run: Run, tokenizer: AnyTokenizer, student: AnyStudent, teacher: AnyTeacher) -> Sampler:
    """The sampler of a run's models, with the token frequencies of its pairs for the baselines, where
    their table can be held and every class has pairs.

    Raises:
        RecipeError: there are no pairs, or they are of another teacher.
    """
    recipe = run.recipe
    frequency = None
    table = recipe.model.num_classes * recipe.model.layout.num_tokens * recipe.model.codebook_size
    if recipe.text is None and table <= _LARGEST_TABLE:
        pairs = pairs_of(run, teacher, tokenizer)
        classes, codes = recipe.model.num_classes, recipe.model.codebook_size
        if len(torch.unique(pairs.labels)) == classes:  # else there is nothing to draw of some
            frequency = marginals(pairs.tokens, pairs.labels, classes, codes).to(run.device)
    return replace(sampler_without_marginals(run, tokenizer, student, teacher), marginals_KLV=frequency)


def weights_of(sampler: Sampler) -> dict[str, str]:
    """A hash for each part of a sampler that there is."""
    parts = {
        "tokenizer": sampler.tokenizer,
        "student": sampler.student,
        "teacher": sampler.teacher,
        "marginal": sampler.marginals_KLV,
    }
    return {name: weights_digest(p) for name, p in parts.items() if isinstance(p, nn.Module | Tensor)}
