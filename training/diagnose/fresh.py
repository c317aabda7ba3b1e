"""Pairs that a student has not seen, and pairs that it learned from, under the same conditions.

Fresh pairs are those that the run would make next: of the same seed, numbered on from the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer
from dd_core.plan import Plan
from dd_core.sampling import Sampler
from training.data import text
from training.data.conditions import ClassConditions, Conditions
from training.diagnose.student import Known
from training.run import Run, sampler_without_marginals
from training.stages.pairs import PROMPTS, Pairs, noise_of, pair_prompts, pairs_of, trajectory_tokens


@dataclass(frozen=True)
class Fresh:
    """The maker of a run's fresh pairs.

    Args:
        sampler: the run's models, drawing as its pairs were drawn.
        pairs: the pairs that the student learns from.
        count: how many fresh ones to make, at most as many as there are pairs.
        batch: how many at a time.
    """

    sampler: Sampler
    pairs: Pairs
    conditions: Conditions
    count: int
    batch: int

    @classmethod
    def of(
        cls, run: Run, tokenizer: AnyTokenizer, teacher: AnyTeacher, student: AnyStudent, count: int
    ) -> Fresh:
        """Raises RecipeError: there is no complete set of pairs, or of other settings or another teacher."""
        recipe, pairs = run.recipe, pairs_of(run, teacher, tokenizer)
        conditions: Conditions = ClassConditions(recipe.model.num_classes)
        if recipe.text is not None:
            prompts = pair_prompts(run)
            conditions = text.prompt_conditions(recipe, prompts, run.out / PROMPTS, run.device)
        sampler = replace(sampler_without_marginals(run, tokenizer, student, teacher), exact=False)
        return cls(sampler, pairs, conditions, min(count, len(pairs.labels)), min(50, recipe.pairs.batch))

    @torch.inference_mode()
    def made(self, chosen: Plan) -> Known:
        """Fresh pairs by a plan that ends with the teacher's trajectory."""
        first = len(self.pairs.labels)
        numbers = range(first, first + self.count)
        tokens = torch.cat(
            [
                trajectory_tokens(
                    self.sampler, chosen, numbers[i : i + self.batch], self.conditions, self.pairs.seed
                )
                for i in range(0, self.count, self.batch)
            ]
        )
        # Noise is of a pair's number alone.
        numbered = Pairs(
            self.pairs.labels, tokens.new_zeros(1, 1).expand(numbers.stop, tokens.shape[1]), self.pairs.seed
        )
        index = torch.tensor(numbers)
        noise = noise_of([numbered], index, self.sampler.codebook_VC.shape[1])
        return Known(index % self.conditions.count, tokens, noise)

    def learned(self) -> Known:
        """Pairs that the student learns from: pair i has the condition of fresh pair i."""
        index = torch.tensor(
            [_alike(i, len(self.pairs.labels), self.conditions.count) for i in range(self.count)]
        )
        noise = noise_of([self.pairs], index, self.sampler.codebook_VC.shape[1])
        return Known(self.pairs.labels[index], self.pairs.tokens[index], noise)


def _alike(i: int, pairs: int, labels: int) -> int:
    """The number of a pair with the label of fresh pair i, another one for each i as far as there are."""
    label = (pairs + i) % labels
    with_it = range(label, pairs, labels)
    return with_it[i // labels % len(with_it)] if with_it else i % pairs
