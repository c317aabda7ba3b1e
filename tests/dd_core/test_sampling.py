"""The one loop: each sampler against its definition, on a tiny random model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency
from torch import Tensor

from dd_core import plan
from dd_core.bundle import Bundle
from dd_core.cache import KVCache
from dd_core.codebook import lookup, nearest
from dd_core.condition import ClassCondition
from dd_core.errors import InvalidPlanError
from dd_core.flow import FlowSettings
from dd_core.logits import LogitSettings
from dd_core.models.llamagen import LlamaGenTeacher
from dd_core.noise import NoiseKey, batch_noise
from dd_core.plan import Plan, Segment
from dd_core.sampling import Sampler, renoise, run_plan, sample_images, student_jump

T = 64


def _inputs(bundle: Bundle, batch: int, seed: int = 0) -> tuple[ClassCondition, Tensor, Tensor]:
    noise, uniform = batch_noise(NoiseKey.of_seed(seed, batch), bundle.sampler.layout, 4)
    return ClassCondition(torch.arange(batch) % 10), noise, uniform


def _tokens(
    bundle: Bundle, chosen: Plan, batch: int, seed: int = 0, sampler: Sampler | None = None
) -> Tensor:
    sampler = sampler or bundle.sampler
    with torch.inference_mode():
        return nearest(
            sampler.tokenizer.codebook_VC, run_plan(sampler, chosen, *_inputs(bundle, batch, seed))
        )


def test_prefilled_cache_equals_stepwise_decoding(bundle: Bundle) -> None:
    """A prefill of 1 + 40 positions, stepwise decoding, and teacher forcing give one answer.

    A mask off by one, a rotary table read at the wrong place or a cache that is not advanced
    changes logits of order 1 by order 1.
    """
    teacher = bundle.sampler.teacher
    assert isinstance(teacher, LlamaGenTeacher)
    tokens, cond = torch.randint(64, (3, T)), ClassCondition(torch.tensor([1, 5, 10]))
    forced = teacher(tokens, cond)
    stepwise, prefilled = teacher.new_cache(3), teacher.new_cache(3)
    for step in range(T):
        logits = teacher.block_logits(tokens, cond, step, stepwise)
        assert torch.allclose(logits[:, 0], forced[:, step], atol=2e-4)
    jump = teacher.block_logits(tokens, cond, 40, prefilled)
    assert torch.allclose(jump[:, 0], forced[:, 40], atol=2e-4)
    # A second jump, from a cache that is not empty, needs its own mask.
    jump = teacher.block_logits(tokens, cond, 50, prefilled)
    assert torch.allclose(jump[:, 0], forced[:, 50], atol=2e-4)
    assert torch.allclose(prefilled.keys[:, :, :, :51], stepwise.keys[:, :, :, :51], atol=2e-4)
    prefilled.length = 0
    assert torch.allclose(teacher.block_logits(tokens, cond, 0, prefilled)[:, 0], forced[:, 0], atol=2e-4)


def test_student_is_causal_and_tells_data_from_noise(bundle: Bundle) -> None:
    student = bundle.sampler.student
    assert student is not None
    cond, noise, _ = _inputs(bundle, 2)
    zero = torch.zeros(2, dtype=torch.long)
    _, before = student.predict(noise, cond, zero)
    changed = noise.clone()
    changed[:, 30:] += 1.0
    _, after = student.predict(changed, cond, zero)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30], after[:, 30])
    _, flagged = student.predict(noise, cond, zero + 10)
    assert not torch.allclose(before[:, 0], flagged[:, 0])


def test_one_batch_may_mix_steps(bundle: Bundle) -> None:
    """A pass over samples at steps 0, 20 and 40 equals three passes of one sample each."""
    student, codebook = bundle.sampler.student, bundle.sampler.tokenizer.codebook_VC
    assert student is not None
    cond, noise, _ = _inputs(bundle, 3)
    steps = torch.tensor([0, 20, 40])
    x = renoise(lookup(codebook, torch.randint(64, (3, T))), noise, steps, student.block_L)
    split = torch.full((3,), T)
    mixed = student_jump(student, codebook, x, cond, steps, split)
    for i in range(3):
        one = slice(i, i + 1)
        alone = student_jump(student, codebook, x[one], cond.select(one), steps[one], split[one])
        assert torch.equal(alone[0], mixed[i])
    assert torch.equal(mixed[2, :40], x[2, :40])


def test_two_steps_keep_the_first_steps_prefix_and_its_noise(bundle: Bundle) -> None:
    """Alg. 3: tokens before the jump are the 1-step ones; the rest starts from the original noise."""
    one, two = (_tokens(bundle, p, 4) for p in (plan.one_step(T), plan.few_steps(T, 20)))
    assert torch.equal(one[:, :20], two[:, :20])
    assert not torch.equal(one[:, 20:], two[:, 20:])
    student, codebook = bundle.sampler.student, bundle.sampler.tokenizer.codebook_VC
    assert student is not None
    cond, noise, _ = _inputs(bundle, 4)
    step = torch.full((4,), 20)
    x = renoise(lookup(codebook, one), noise, step, student.block_L)
    by_hand = nearest(codebook, student_jump(student, codebook, x, cond, step, torch.full((4,), T)))
    assert torch.equal(by_hand, two)


def test_hybrid_keeps_the_students_prefix_and_lets_the_teacher_continue(bundle: Bundle) -> None:
    """Alg. 4: S 0→10, Te 10→20 given that prefix, S 20→T given both."""
    made, one = _tokens(bundle, plan.hybrid(T, 10, 20), 4), _tokens(bundle, plan.one_step(T), 4)
    assert torch.equal(made[:, :10], one[:, :10])
    assert not torch.equal(made[:, 10:20], one[:, 10:20])


def test_split_leaves_the_tail_continuous(bundle: Bundle) -> None:
    """Before the split: codebook rows. After it: the embedding head's own vectors."""
    codebook = bundle.sampler.tokenizer.codebook_VC
    codes = run_plan(bundle.sampler, plan.one_step(T, split=16), *_inputs(bundle, 2))
    snapped = lookup(codebook, nearest(codebook, codes))
    assert torch.allclose(codes[:, :16], snapped[:, :16])
    assert not torch.allclose(codes[:, 16:], snapped[:, 16:], atol=1e-2)


def test_split_at_the_ends(bundle: Bundle) -> None:
    assert bundle.sampler.student is not None
    cond, noise, _ = _inputs(bundle, 2)
    embeddings, _ = bundle.sampler.student.predict(noise, cond, torch.zeros(2, dtype=torch.long))
    assert torch.equal(run_plan(bundle.sampler, plan.one_step(T, split=0), *_inputs(bundle, 2)), embeddings)
    whole = run_plan(bundle.sampler, plan.one_step(T, split=T), *_inputs(bundle, 2))
    assert torch.equal(whole, run_plan(bundle.sampler, plan.one_step(T), *_inputs(bundle, 2)))


def test_algorithm_1_equals_teacher_sampling_in_distribution(bundle: Bundle) -> None:
    """The first two tokens of 6,000 samples, by the flow map and by multinomial draws.

    A test of homogeneity on the joint of (first token, parity of the second); a map that ignores
    the noise, or uses a later token's noise, fails it or the uniqueness below.
    """
    draw = LogitSettings(guidance=1.5, top_k=8)
    sampler = replace(bundle.sampler, draw=draw, exact=False, flow=FlowSettings("dpmpp-3m", 40))
    # Two blocks and a look-up are enough for the joint of two tokens.
    tail = (Segment("marginal", 2, T),)
    by_flow = Plan("flow-2", (Segment("teacher", 0, 2), *tail), draw="flow")
    by_multinomial = Plan("multinomial-2", (Segment("teacher", 0, 2), *tail))
    cond = ClassCondition(torch.full((6000,), 3))
    noise, uniform = torch.randn(6000, T, 4), torch.rand(6000, T)
    counts = []
    for chosen in (by_flow, by_multinomial):
        codes = run_plan(sampler, chosen, cond, noise, uniform)
        tokens = nearest(sampler.tokenizer.codebook_VC, codes[:, :2])
        counts.append((tokens[:, 0] * 2 + tokens[:, 1] % 2).bincount(minlength=128))
    table = torch.stack(counts)
    table = table[:, table.sum(0) >= 10]
    assert table.shape[1] > 4
    assert chi2_contingency(table.numpy()).pvalue > 0.001


def test_trajectory_is_a_function_of_the_noise_alone(bundle: Bundle) -> None:
    first = _tokens(bundle, plan.trajectory(T), 3)
    cond, noise, uniform = _inputs(bundle, 3)
    codes = run_plan(bundle.sampler, plan.trajectory(T), cond, noise, 1 - uniform)
    assert torch.equal(nearest(bundle.sampler.tokenizer.codebook_VC, codes), first)
    assert not torch.equal(first, _tokens(bundle, plan.trajectory(T), 3, seed=1))


def test_marginals_follow_their_table(bundle: Bundle) -> None:
    table = torch.full((10, T, 64), float("-inf"))
    table[:, :, 7] = 0.0
    table[4, :, :] = float("-inf")
    table[4, :, 9] = 0.0
    sampler = replace(bundle.sampler, marginals_KLV=table)
    tokens = _tokens(bundle, plan.onestep(T), 5, sampler=sampler)
    assert (tokens[:4] == 7).all() and (tokens[4] == 9).all()
    skipped = _tokens(bundle, plan.skip(T, 24), 3, sampler=sampler)
    teacher = _tokens(bundle, plan.teacher(T), 3)
    assert torch.equal(skipped[:, :40], teacher[:, :40])
    assert (skipped[:, 40:] == 7).all()


@pytest.mark.parametrize(
    "name", ["dd-1", "dd-2", "pre-trained-11-21", "pre-trained-1-21", "teacher", "trajectory"]
)
def test_one_request_alone_equals_the_same_request_in_a_mixed_batch(bundle: Bundle, name: str) -> None:
    """Byte for byte, in batches of many sizes, at every place."""
    chosen = next(p.plan for p in bundle.presets if p.plan.name == name)
    rng = random.Random(name)
    alone = sample_images(bundle.sampler, chosen, [3], [(11, 2)])[0]
    for size in (2, 3, 5, 8):
        place = rng.randrange(size)
        labels = [rng.randrange(10) for _ in range(size)]
        keys = [(rng.randrange(2**60), rng.randrange(16)) for _ in range(size)]
        labels[place], keys[place] = 3, (11, 2)
        assert torch.equal(sample_images(bundle.sampler, chosen, labels, keys)[place], alone)


def test_teacher_logits_round_alike_in_every_batch_on_two_threads(bundle: Bundle, two_threads: None) -> None:
    """The attention of one query rounded by the thread that an image fell to."""
    teacher = bundle.sampler.teacher
    assert teacher is not None
    tokens, cond = torch.randint(64, (40, T)), ClassCondition(torch.arange(40) % 10)

    def logits(size: int) -> Tensor:
        cache = teacher.new_cache(size)
        few = cond.select(slice(size))
        steps = [teacher.block_logits(tokens[:size], few, k, cache) for k in range(T)]
        return torch.cat(steps, 1)

    with torch.inference_mode():
        whole = logits(40)
        for size in (16, 20, 36):
            assert torch.equal(logits(size), whole[:size]), size


def test_idle_rows_are_not_remembered_and_change_nothing(bundle: Bundle) -> None:
    """They only make products large enough; a single image used to need the memory of eight."""
    teacher = bundle.sampler.teacher
    assert teacher is not None
    tokens, cond = torch.randint(64, (16, T)), ClassCondition(torch.arange(16) % 10)
    alone, among = teacher.new_cache(2), teacher.new_cache(16)
    for step in (0, 1, 2, 7):  # a prefill, steps and a jump
        few = teacher.block_logits(tokens, cond, step, alone)
        many = teacher.block_logits(tokens, cond, step, among)
        assert torch.equal(few[:2], many[:2])
        assert torch.equal(alone.keys[:, :, :, : alone.length], among.keys[:, :2, :, : alone.length])
    asked = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(teacher, name)

        def new_cache(self, batch: int) -> KVCache:
            asked.append(batch)
            return teacher.new_cache(batch)

    sampler = replace(bundle.sampler, teacher=Spy())
    sample_images(sampler, plan.teacher(T), [3], [(11, 2)])
    assert asked == [2], "one image and its unconditional half"


def test_a_plan_for_another_layout_or_without_its_actor_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InvalidPlanError, match="256 blocks"):
        run_plan(bundle.sampler, plan.one_step(256), *_inputs(bundle, 1))
    with pytest.raises(InvalidPlanError, match="needs a teacher"):
        run_plan(replace(bundle.sampler, teacher=None), plan.teacher(T), *_inputs(bundle, 1))
