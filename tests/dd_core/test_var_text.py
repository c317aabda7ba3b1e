"""VAR's models with a text in the place of the class embedding, which no published model has.

Shapes: B batch, T text positions, N text state dimension.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dd_core import plan
from dd_core.condition import ClassCondition, TextCondition
from dd_core.engine.arithmetic import BF16, EXACT32, Arithmetic
from dd_core.engine.prepared import prepare
from dd_core.engine.var import FoldedStudent, FoldedTeacher
from dd_core.errors import InvalidRequestError
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.noise import NoiseKey, batch_noise
from dd_core.sampling import Sampler, run_plan, sample_images
from dd_core.text.encoder import padded_batch
from tests.dd_core.test_condition import LENGTHS, encoded, left_padded
from tests.tiny_var import VAR, L, T, tiny_var_models

TEXT = replace(VAR, num_classes=1, text_tokens=6, text_dim=5)
EXACT64 = Arithmetic("exact64", torch.float64, torch.float64, folds_narrow=True)


def texts(garbage: float = 1.0) -> TextCondition:
    """Four texts of different lengths, one without a word; `garbage` at the encoder's padding."""
    return left_padded(*encoded(garbage))


@pytest.fixture
def models() -> tuple[MultiScaleVQ, VARStudent, VARTeacher]:
    return tiny_var_models(TEXT)


@pytest.fixture
def sampler(models: tuple[MultiScaleVQ, VARStudent, VARTeacher]) -> Sampler:
    tokenizer, student, teacher = models
    made = Sampler(TEXT.layout, tokenizer, student, teacher)
    return replace(made, draw=replace(made.draw, guidance=2.0))


def test_the_vector_is_made_of_the_mean_of_a_texts_own_states(models: tuple[object, ...]) -> None:
    _, _, teacher = models
    assert isinstance(teacher, VARTeacher)
    text = texts()
    own = [row[row.shape[0] - n :].mean(0) for row, n in zip(text.states_BTN, LENGTHS, strict=True) if n]
    expected = teacher.class_emb.cap_proj(torch.stack(own))
    found = teacher.label(text)
    worded = [b for b, n in enumerate(LENGTHS) if n]
    assert found.shape == (4, TEXT.dim) and found.isfinite().all()
    assert torch.allclose(found[worded], expected, atol=1e-5)
    noisy = TextCondition(torch.where(text.mask_BT[..., None], text.states_BTN, 3.0), text.mask_BT)
    assert torch.equal(teacher.label(noisy), found), "what stands at the padding changes nothing"


def test_no_text_is_one_vector_whatever_the_text_was(models: tuple[object, ...]) -> None:
    _, _, teacher = models
    assert isinstance(teacher, VARTeacher)
    nothing = teacher.null_like(texts())
    assert isinstance(nothing, TextCondition)
    assert torch.equal(nothing.mask_BT, texts().mask_BT)
    vectors = teacher.label(nothing)[[b for b, n in enumerate(LENGTHS) if n]]
    assert torch.allclose(vectors, vectors[:1].expand_as(vectors), atol=1e-6)
    assert not torch.allclose(vectors[0], teacher.label(texts())[0], atol=1e-2)


def test_scale_by_scale_equals_teacher_forcing(models: tuple[object, ...]) -> None:
    _, _, teacher = models
    assert isinstance(teacher, VARTeacher)
    tokens, text = torch.randint(TEXT.codebook_size, (4, L)), texts()
    forced, cache = teacher(tokens, text), teacher.new_cache(4)
    for step in range(T):
        found = teacher.block_logits(tokens, text, step, cache)
        place = slice(TEXT.layout.starts[step], TEXT.layout.starts[step + 1])
        assert torch.allclose(found, forced[:, place], atol=2e-4)


@pytest.mark.parametrize("arithmetic", [None, EXACT32, BF16], ids=["reference", "exact32", "bf16"])
@pytest.mark.parametrize(
    "chosen", [plan.one_step(T), plan.few_steps(T, 2), plan.hybrid(T, 1, 2), plan.teacher(T, draw="flow")],
    ids=lambda p: p.name,
)  # fmt: skip
def test_a_text_alone_equals_the_same_text_in_a_batch(
    sampler: Sampler, chosen: plan.Plan, arithmetic: Arithmetic | None
) -> None:
    sampler = sampler if arithmetic is None else prepare(sampler, arithmetic)
    whole = sample_images(sampler, chosen, texts(), [(7, i) for i in range(4)])
    for b in range(4):
        alone = sample_images(sampler, chosen, texts().select(slice(b, b + 1)), [(7, b)])
        assert torch.equal(alone[0], whole[b])
    other = TextCondition(texts().states_BTN.flip(0), texts().mask_BT.flip(0))
    assert not torch.equal(sample_images(sampler, chosen, other, [(7, i) for i in range(4)]), whole)


@torch.no_grad()
def test_prepared_models_are_the_models(sampler: Sampler) -> None:
    """Folds in float64, to twelve digits; where texts are the condition nothing can be a table."""
    student, teacher = sampler.student, sampler.teacher
    assert isinstance(student, VARStudent) and isinstance(teacher, VARTeacher)
    for model in (student, teacher, sampler.tokenizer):
        assert isinstance(model, torch.nn.Module)
        model.double()
    wide = TextCondition(texts().states_BTN.double(), texts().mask_BT)
    folded = FoldedStudent(student, EXACT64)
    assert not folded.vectors.tables
    noise = batch_noise(NoiseKey.of_seed(1, 4), TEXT.layout, TEXT.code_dim)[0].double()
    step = torch.tensor([0, 3, 1, 2])
    for found, expected in zip(
        folded.predict(noise, wide, step), student.predict(noise, wide, step), strict=True
    ):
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    prepared = FoldedTeacher(teacher, teacher.next_inputs, EXACT64)
    tokens = torch.randint(TEXT.codebook_size, (4, L))
    for cond in (wide, prepared.null_like(wide)):
        found = prepared.block_logits(tokens, cond, 2, prepared.new_cache(4))
        expected = teacher.block_logits(tokens, cond, 2, teacher.new_cache(4))
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_exact32_keeps_the_bytes(sampler: Sampler) -> None:
    noise, uniform = batch_noise(NoiseKey.of_seed(3, 4), TEXT.layout, TEXT.code_dim)
    for chosen in (plan.one_step(T), plan.hybrid(T, 1, 2)):
        codes = run_plan(sampler, chosen, texts(), noise, uniform)
        assert torch.equal(run_plan(prepare(sampler, EXACT32), chosen, texts(), noise, uniform), codes)


def test_a_student_begins_as_its_teacher(models: tuple[object, ...]) -> None:
    tokenizer, _, teacher = models
    assert isinstance(tokenizer, MultiScaleVQ) and isinstance(teacher, VARTeacher)
    student = VARStudent(TEXT).from_teacher(teacher, tokenizer.codebook_VC)
    assert torch.equal(student.label(texts()), teacher.label(texts()))


@pytest.mark.parametrize("text_model", [True, False])
def test_the_wrong_kind_of_condition_is_refused(text_model: bool) -> None:
    _, student, teacher = tiny_var_models(TEXT if text_model else VAR)
    cond = ClassCondition(torch.tensor([1])) if text_model else texts()
    wanted = "text states" if text_model else "class indices"
    for model in (student, teacher):
        with pytest.raises(InvalidRequestError, match=wanted) as caught:
            model.label(cond)
        assert caught.value.param == "condition"
    with pytest.raises(InvalidRequestError, match=wanted):
        teacher.null_like(cond)


def test_as_many_texts_as_served_together_keep_their_bytes() -> None:
    """States as long and as wide as MiniLM's, in batches around the least number of rows of a product."""
    cfg = replace(TEXT, text_tokens=16, text_dim=384)
    tokenizer, student, teacher = tiny_var_models(cfg)
    made = Sampler(cfg.layout, tokenizer, student, teacher)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1 + i % 16, 384, generator=generator) for i in range(19)]
    cond = padded_batch(rows, 16)
    for chosen in (plan.one_step(T), plan.teacher(T)):
        whole = sample_images(made, chosen, cond, [(3, i) for i in range(19)])
        for batch in (1, 5, 17):
            some = slice(19 - batch, 19)
            found = sample_images(made, chosen, cond.select(some), [(3, i) for i in range(19)[some]])
            assert torch.equal(found, whole[some]), (chosen.name, batch)
