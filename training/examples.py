"""Examples of a model of texts, chosen by measurement: the names that it draws so that they can be told.

    names of concepts ─▶ `seeds` pictures each ─▶ closer to their own name than to 99 others? ─▶ order

The judge is that of "right caption of 100" (`training.metrics.caption_retrieval`). A page that shows the
first of them shows the model at its best, and must say so.

Shapes: N pictures, M names.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch

from dd_core.errors import RecipeError
from dd_core.files import replacing
from dd_core.plan import Plan, plan_for_budget
from dd_core.sampling import Sampler, sample_images
from training.data import pictograms, text
from training.data.captions import called
from training.data.conditions import TextConditions
from training.losses.lpips import Lpips, lpips_weights
from training.metrics.caption_retrieval import Agreement, sentences
from training.presets import presets
from training.run import Run
from training.trained import load_models, sampler_of, weights_of

log = logging.getLogger("dd_train")

FILE = "examples.json"


@dataclass(frozen=True)
class Example:
    """A name of the corpus.

    Args:
        group: emojibase's number for what kind of thing it is: faces, people, animals, food, …
        right: share of its pictures that lie closer to it than to 99 other names.
        margin: by how much they do, on average.
    """

    name: str
    group: int
    right: float
    margin: float


def choose(run: Run, budget: int, seeds: int, names: int = 0, least: float = 0.5) -> list[Example]:
    """Names of the run's corpus, the best drawn of every group in turn, also in `RUN/examples.json`.

    Args:
        budget: passes: of the plan that `steps` would choose.
        seeds: pictures of each name.
        names: the first so many of the corpus are drawn, and told from any; 0 = all.
        least: share of right pictures; names with less are left out.

    Raises:
        RecipeError: the run is not of the pictograms, or a stage is missing.
    """
    recipe = run.recipe
    if recipe.data != "pictograms":
        raise RecipeError(f"the recipe {recipe.name!r} has no names to choose from", param="recipe")
    sampler, lpips = sampler_of(run, *load_models(run)), Lpips(lpips_weights())
    plan = plan_for_budget(presets(recipe), budget).plan
    corpus = pictograms.load()
    concepts = [corpus.concepts[i] for i in text.pictures("train")]
    groups = {called(concept): concept.group for concept in concepts}
    states, mask = text.encoded(recipe, list(groups), run.out / "captions-names.safetensors")
    judge = text.caption_judge(recipe, run.out, lpips)
    agreement = Agreement(judge, lpips, sentences(states, mask), list(groups))
    chosen = list(groups)[: names or None]
    conditions = TextConditions.of_prompts(states[: len(chosen)], mask[: len(chosen)])
    found = _measured(sampler, plan, conditions, agreement, seeds)
    examples = [Example(name, groups[name], *figures) for name, figures in zip(chosen, found, strict=True)]
    ordered = list(in_turn(e for e in examples if e.right >= least))
    with replacing(run.out / FILE) as temporary:
        record = {"weights": _student_of(sampler), "names": [e.name for e in ordered]}
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return ordered


def in_turn(examples: Iterable[Example]) -> Iterator[Example]:
    """The best of each group, then the second best of each, and so on; groups by their best."""
    best = sorted(examples, key=lambda e: (e.right, e.margin), reverse=True)
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in best:
        groups[example.group].append(example)
    return (e for e in chain.from_iterable(zip_longest(*groups.values())) if e is not None)


def read_examples(run: Run, sampler: Sampler) -> tuple[str, ...]:
    """The names that were chosen for a student and its tokenizer; none where none were, or for others."""
    path = run.out / FILE
    if sampler.student is None or not path.exists():
        return ()
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["weights"] != _student_of(sampler):
        log.warning("%s is of other weights and left out; run `%s` again", path, run.command("examples"))
        return ()
    return tuple(saved["names"])


def _student_of(sampler: Sampler) -> dict[str, str]:
    """Hashes of what draws an example."""
    return {part: digest for part, digest in weights_of(sampler).items() if part in ("tokenizer", "student")}


def _measured(
    sampler: Sampler,
    plan: Plan,
    conditions: TextConditions,
    agreement: Agreement,
    seeds: int,
    batch: int = 250,
) -> list[tuple[float, float]]:
    """Of each name the share of right pictures and the mean margin."""
    margins = torch.zeros(seeds, conditions.count)
    for seed in range(seeds):
        for labels in torch.split(torch.arange(conditions.count), batch):
            keys = [(seed, 0)] * len(labels)
            drawn = sample_images(sampler, plan, conditions(labels).to(sampler.device), keys)
            margins[seed, labels] = agreement.margins(drawn.permute(0, 3, 1, 2).contiguous(), labels)
    right = (margins > 0).float().mean(0)
    return list(zip(right.tolist(), margins.mean(0).tolist(), strict=True))
