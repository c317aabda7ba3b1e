"""A segment under way: `run_plan` and any other way of taking the same advances make the same codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core import plan
from dd_core.bundle import Bundle, load_bundle
from dd_core.condition import Condition, as_condition
from dd_core.errors import InvalidRequestError
from dd_core.noise import NoiseKey, batch_noise
from dd_core.plan import Plan, Segment
from dd_core.sampling import Sampler, SegmentRun, run_plan
from tests.tiny import tiny_bundle
from tests.tiny_text import tiny_text_bundle
from tests.tiny_var import tiny_var_bundle
from tests.tiny_var_text import tiny_var_text_bundle

BUNDLES: dict[str, Callable[[Path], Path]] = {
    "llamagen": tiny_bundle,
    "text": tiny_text_bundle,
    "var": tiny_var_bundle,
    "var-text": tiny_var_text_bundle,
}
PROMPTS = ("a red cat", "blue hearts", "a dog", "cat")


@dataclass(frozen=True)
class Given:
    """Four images: their models, conditions and noise."""

    bundle: Bundle
    cond: Condition
    noise_BLC: Tensor
    uniform_BL: Tensor

    @property
    def sampler(self) -> Sampler:
        return self.bundle.sampler

    def run(self, at: list[tuple[Plan, int]], x_BLC: Tensor, rows: list[int]) -> SegmentRun:
        """A run of some of the images, whose codes are those of `x`."""
        cond = self.cond.select(torch.tensor(rows))
        return SegmentRun.begin(
            self.sampler, at, x_BLC[rows], cond, self.noise_BLC[rows], self.uniform_BL[rows]
        )

    def alone(self, chosen: Plan, row: int) -> Tensor:
        one = slice(row, row + 1)
        return run_plan(
            self.sampler, chosen, self.cond.select(one), self.noise_BLC[one], self.uniform_BL[one]
        )[0]


@pytest.fixture(scope="module", params=BUNDLES)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = BUNDLES[request.param](tmp_path_factory.mktemp(request.param))
    bundle = load_bundle(folder, torch.device("cpu"))
    sampler = bundle.sampler
    keys = [*NoiseKey.of_seed(3, 3), NoiseKey(3, 0).spliced(1, 4, 0)]
    cond = bundle.text.encode(PROMPTS) if bundle.text is not None else as_condition([3, 0, 7, 7])
    return Given(bundle, cond, *batch_noise(keys, sampler.layout, sampler.codebook_VC.shape[1]))


@torch.inference_mode()
def test_advances_by_hand_are_run_plan(given: Given) -> None:
    """A student's and a marginal's segment takes one advance, a teacher's one a block."""
    for preset in given.bundle.presets:
        chosen, x_BLC = preset.plan, given.noise_BLC
        for index, segment in enumerate(chosen.segments):
            run, advances = given.run([(chosen, index)] * 4, x_BLC, [0, 1, 2, 3]), 0
            while not run.done:
                run.advance()
                advances += 1
            assert advances == (segment.stop - segment.start if segment.actor == "teacher" else 1)
            x_BLC = run.codes()
        whole = run_plan(given.sampler, chosen, given.cond, given.noise_BLC, given.uniform_BL)
        assert torch.equal(x_BLC, whole), chosen.name


@torch.inference_mode()
def test_images_at_different_steps_of_different_plans_share_a_run(given: Given) -> None:
    """One student batch: first jumps with and without a split, a second jump, the end of a hybrid.

    Each image's codes are bit for bit those of its own plan run alone.
    """
    blocks = given.sampler.layout.num_blocks
    plans = [
        plan.one_step(blocks),
        plan.one_step(blocks, split=2),
        plan.few_steps(blocks, 2, split=3),
        plan.hybrid(blocks, 0, 2, split=3),
    ]
    x_BLC = given.noise_BLC.clone()
    teacher = given.run([(plans[3], 0)], x_BLC, [3])
    while not teacher.done:
        teacher.advance()
    x_BLC[3:] = teacher.codes()
    early = given.run([(plans[2], 0), (plans[0], 0)], x_BLC, [2, 0])
    early.advance()
    x_BLC[2] = early.codes()[0]
    assert torch.equal(early.codes()[1], given.alone(plans[0], 0))
    mixed = given.run(list(zip(plans, (0, 0, 1, 1), strict=True)), x_BLC, [0, 1, 2, 3])
    mixed.advance()
    assert mixed.done
    for row, (codes_LC, chosen) in enumerate(zip(mixed.codes(), plans, strict=True)):
        assert torch.equal(codes_LC, given.alone(chosen, row)), chosen.name


@torch.inference_mode()
def test_two_teacher_batches_take_turns(given: Given) -> None:
    """Advances of other batches in between change nothing, and before the end there is X_t to see."""
    chosen = plan.teacher(given.sampler.layout.num_blocks)
    first, second = given.run([(chosen, 0)] * 3, given.noise_BLC, [0, 1, 2]), None
    for step in range(given.sampler.layout.num_blocks):
        known = given.sampler.layout.starts[step]
        assert torch.equal(first.codes()[:, known:], given.noise_BLC[:3, known:])
        first.advance()
        if step == 1:
            second = given.run([(chosen, 0)], given.noise_BLC, [3])
        if second is not None:
            second.advance()
    assert second is not None and first.done and not second.done
    second.advance()
    made = torch.cat([first.codes(), second.codes()])
    assert second.done
    for row in range(4):
        assert torch.equal(made[row], given.alone(chosen, row))


@torch.inference_mode()
def test_a_teachers_bad_logits_spoil_their_own_image(given: Given) -> None:
    blocks = given.sampler.layout.num_blocks
    x_BLC = given.noise_BLC.clone()
    x_BLC[1, 0] = torch.nan
    run = given.run([(plan.hybrid(blocks, 1, 2), 1)] * 4, x_BLC, [0, 1, 2, 3])
    run.advance()
    assert run.codes().isfinite().flatten(1).all(1).tolist() == [True, False, True, True]


def test_only_students_segments_are_batched_across_plans(given: Given) -> None:
    blocks = given.sampler.layout.num_blocks
    at = [(plan.teacher(blocks), 0), (plan.teacher(blocks, "flow"), 0)]
    with pytest.raises(AssertionError, match="student"):
        given.run(at, given.noise_BLC, [0, 1])


@pytest.mark.parametrize("given", ["text"], indirect=True)
def test_frequencies_are_of_classes(given: Given) -> None:
    marginals = torch.zeros(1, given.sampler.layout.num_tokens, len(given.sampler.codebook_VC))
    sampler = replace(given.sampler, marginals_KLV=marginals)
    chosen = plan.onestep(sampler.layout.num_blocks)
    with pytest.raises(InvalidRequestError, match="class indices"):
        run_plan(sampler, chosen, given.cond, given.noise_BLC, given.uniform_BL)


def test_an_actor_that_is_not_known_runs_as_no_other(given: Given) -> None:
    """Once it was taken for a marginal."""
    segment = Segment("student", 0, given.sampler.layout.num_blocks)
    unknown = Plan("unknown", (segment,))
    object.__setattr__(segment, "actor", "oracle")  # `Plan` refuses it
    with pytest.raises(AssertionError, match="oracle"):
        given.run([(unknown, 0)], given.noise_BLC, [0])
