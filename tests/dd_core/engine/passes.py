"""Images on a runner: put in, and brought through all passes of their plan, as a scheduler would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dd_core import plan
from dd_core.condition import ClassCondition
from dd_core.engine.runner import Runner
from dd_core.noise import NoiseKey
from dd_core.plan import Plan
from tests.tiny_var import T as VAR_T

Image = tuple[int, Plan, int]  # number, plan, class
SEED = 7
# Every kind of segment of both families.
PLANS = {
    "var": [
        plan.one_step(VAR_T, split=2),
        plan.few_steps(VAR_T, 2, split=3),
        plan.hybrid(VAR_T, 1, 2, split=3),
        plan.teacher(VAR_T),
        plan.trajectory(VAR_T),
    ],
    "llamagen": [plan.one_step(64), plan.few_steps(64, 20), plan.hybrid(64, 10, 12), plan.onestep(64)],
}


def images_of(chosen: Plan, count: int, first: int = 0) -> list[Image]:
    """Images of one plan; the class follows from the number."""
    return [(number, chosen, number * 3 % 10) for number in range(first, first + count)]


def put(runner: Runner, images: Sequence[Image]) -> None:
    """Take images in: the noise of image `number` of `SEED`."""
    numbers, plans, labels = zip(*images, strict=True)
    cond = ClassCondition(torch.tensor(labels))
    runner.put(numbers, plans, cond, [NoiseKey(SEED, number) for number in numbers])


def run(runner: Runner, images: Sequence[Image], bucket: int | None = None) -> None:
    """All passes of images of one plan."""
    numbers, chosen = [number for number, _, _ in images], images[0][1]
    for segment, part in enumerate(chosen.segments):
        stepwise = part.actor == "teacher"
        for _ in range(part.stop - part.start if stepwise else 1):
            batch = 10_000 + numbers[0] if stepwise else None
            runner.advance(numbers, [segment] * len(numbers), bucket or len(numbers), batch)


def pictures(runner: Runner, images: Sequence[Image], bucket: int | None = None) -> Tensor:
    """Pixels of images, from beginning to end; nothing of them is left behind."""
    put(runner, images)
    run(runner, images, bucket)
    pixels, good = runner.decode([number for number, _, _ in images])
    assert good.all()
    runner.drop([number for number, _, _ in images])
    return pixels
