"""Which plans a run measures, and which of them its bundle offers."""

from __future__ import annotations

from dataclasses import replace

from dd_core import plan
from dd_core.errors import InvalidPlanError, RecipeError
from dd_core.hub.registry import registry
from dd_core.plan import Plan, Preset
from dd_core.sampling import Sampler, check_plan
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
    found: dict[str, Preset] = {}
    for preset in _all(recipe):
        found.setdefault(preset.plan.name, preset)
    if unknown := [name for name in recipe.evaluate.plans if name not in found]:
        raise RecipeError(
            f"evaluate.plans has no plan {unknown[0]!r}; choose from {', '.join(found)}",
            param="evaluate.plans",
        )
    return [p for name, p in found.items() if not recipe.evaluate.plans or name in recipe.evaluate.plans]


def renamed(before: Recipe, now: Recipe) -> tuple[str, ...]:
    """`evaluate.plans` of a recipe at another number of blocks, by which hybrids and skips are named."""
    pairs = zip(_all(before), _all(now), strict=False)
    names = {old.plan.name: new.plan.name for old, new in pairs}
    return tuple(dict.fromkeys(names.get(name, name) for name in before.evaluate.plans))


def _all(recipe: Recipe) -> list[Preset]:
    """Every plan, some of them twice where blocks are few."""
    blocks, later = recipe.model.layout.num_blocks, [t for t in recipe.distill.train_steps if t]
    split = recipe.distill.split
    offered = [plan.one_step(blocks, split)]
    if later:
        offered += [plan.few_steps(blocks, *sorted(later), split=split)]
        offered += _published_hybrids(recipe) or [
            plan.hybrid(blocks, a, later[0], split, draw="flow")
            for a in (later[0] * 2 // 3, later[0] // 3, 0)
        ]
    offered.append(plan.teacher(blocks, draw="flow"))
    baselines = [
        replace(plan.teacher(blocks), name="teacher-multinomial"),
        plan.skip(blocks, blocks * 106 // 256),
        plan.onestep(blocks),
    ]
    if recipe.text is not None:
        baselines = baselines[:1]  # frequencies are of classes
    return [Preset(p) for p in offered] + [Preset(p, offered=False) for p in baselines]


def _published_hybrids(recipe: Recipe) -> list[Plan]:
    """Table 2's plans, each with its own split, where the recipe is a published student's as it stands."""
    spec = registry().get(recipe.name)
    if spec is None or spec.student != recipe.model:
        return []
    plans = {entry.name: entry.preset().plan for entry in spec.presets}
    steps = [t for t in recipe.distill.train_steps if t]
    if plans["dd-2"] != plan.few_steps(recipe.model.layout.num_blocks, *steps, split=recipe.distill.split):
        return []
    return [p for name, p in plans.items() if name.startswith("pre-trained-")]


def runs(sampler: Sampler, chosen: Plan) -> bool:
    """True if `sampler` has the layout and the actors of a plan."""
    try:
        check_plan(sampler, chosen)
    except InvalidPlanError:
        return False
    return True
