"""Which plans a run measures, and which of them its bundle offers."""

from __future__ import annotations

from dataclasses import replace

from dd_core import plan
from dd_core.errors import RecipeError
from dd_core.plan import Preset
from training.recipes.settings import Recipe


def presets(recipe: Recipe) -> list[Preset]:
    """The plans that a bundle offers, and the baselines that it is compared with.

    Of these the ones that `evaluate.plans` names, or all.

    Hybrids let the teacher make the blocks from the start, from a third and from two thirds of
    the way to the second training step, as in the paper's Table 2. They and the offered teacher draw
    by the map of the noise, so that a seed is one picture at every budget.

    Raises:
        RecipeError: `evaluate.plans` names a plan that there is not.
    """
    blocks, later = recipe.model.layout.num_blocks, [t for t in recipe.distill.train_steps if t]
    split = recipe.distill.split
    offered = [plan.one_step(blocks, split)]
    if later:
        offered += [plan.few_steps(blocks, *sorted(later), split=split)]
        offered += [
            plan.hybrid(blocks, a, later[0], split, draw="flow")
            for a in dict.fromkeys((later[0] * 2 // 3, later[0] // 3, 0))
        ]
    offered.append(plan.teacher(blocks, draw="flow"))
    baselines = [
        replace(plan.teacher(blocks), name="teacher-multinomial"),
        plan.skip(blocks, blocks * 106 // 256),
        plan.onestep(blocks),
    ]
    if recipe.text is not None:
        baselines = baselines[:1]  # frequencies are of classes
    found = [Preset(p) for p in offered] + [Preset(p, offered=False) for p in baselines]
    chosen, names = recipe.evaluate.plans, [p.plan.name for p in found]
    if unknown := [name for name in chosen if name not in names]:
        raise RecipeError(
            f"evaluate.plans has no plan {unknown[0]!r}; choose from {', '.join(names)}",
            param="evaluate.plans",
        )
    return [p for p in found if not chosen or p.plan.name in chosen]
