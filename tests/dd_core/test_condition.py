"""Conditions: classes and texts alike, in a batch; and a text's padding, which must not matter.

Shapes: B batch, T text positions, N text state dimension.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dd_core.condition import ClassCondition, TextCondition
from dd_core.errors import InvalidRequestError
from dd_core.logits import LogitSettings
from dd_core.models.config import LlamaGenConfig
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.plan import teacher as teacher_plan
from dd_core.sampling import Sampler, run_plan
from dd_core.text.encoder import padded_batch
from tests.conformance.recording import redraw

TEXT = LlamaGenConfig(2, 2, 16, 16, 4, 3, 7, hidden_multiple=8, text_tokens=6, text_dim=5)
LENGTHS = (2, 6, 0, 4)


def left_padded(states: Tensor, mask: Tensor) -> TextCondition:
    return padded_batch([row[kept] for row, kept in zip(states, mask.bool(), strict=True)], mask.shape[1])


def encoded(garbage: float = 1.0) -> tuple[Tensor, Tensor]:
    """An encoder's right-padded output, with noise at the padding."""
    states = torch.arange(1.0, 4 * 6 * 5 + 1).reshape(4, 6, 5).sin()
    mask = torch.tensor([[int(i < n) for i in range(6)] for n in LENGTHS])
    return torch.where(mask[..., None] > 0, states, garbage), mask


def _teacher() -> LlamaGenTeacher:
    model = LlamaGenTeacher(TEXT).eval().requires_grad_(False)
    redraw(model, 0)
    return model


def test_left_padding_moves_the_words_to_the_end_and_clears_the_rest() -> None:
    states, mask = encoded()
    made = left_padded(states, mask)
    for b, n in enumerate(LENGTHS):
        assert torch.equal(made.states_BTN[b, 6 - n :], states[b, :n])
        assert not made.states_BTN[b, : 6 - n].any()
        assert made.mask_BT[b].tolist() == [False] * (6 - n) + [True] * n
    assert made.mask_BT.dtype == torch.bool


def test_both_kinds_are_joined_padded_and_chosen_alike() -> None:
    text, labels = left_padded(*encoded()), ClassCondition(torch.tensor([3, 1, 4, 1]))
    for cond in (text, labels):
        assert len(cond) == 4 and len(cond.joined(cond)) == 8 and len(cond.padded(3)) == 7
        assert len(cond.padded(0)) == 4 and len(cond.joined()) == 4 and len(cond.joined(cond, cond)) == 12
    other = ClassCondition(labels.labels_B + 1)
    first = torch.tensor([True, False, False, True])
    assert labels.joined(other).labels_B.tolist() == [3, 1, 4, 1, 4, 2, 5, 2]
    assert labels.padded(2).labels_B.tolist() == [3, 1, 4, 1, 0, 0]
    assert labels.select(torch.tensor([2, 0])).labels_B.tolist() == [4, 3]
    assert labels.where(first, other).labels_B.tolist() == [3, 2, 5, 1]
    wide = text.padded(2)
    assert torch.equal(wide.states_BTN[:4], text.states_BTN) and torch.equal(wide.mask_BT[:4], text.mask_BT)
    assert not wide.states_BTN[4:].any() and not wide.mask_BT[4:].any()
    shifted = TextCondition(text.states_BTN + 1, text.mask_BT.roll(1, 0))
    both = text.joined(shifted)
    assert torch.equal(both.states_BTN, torch.cat([text.states_BTN, text.states_BTN + 1]))
    mixed = text.where(first, shifted)
    for row in range(4):
        source = (text if first[row] else shifted).select(slice(row, row + 1))
        assert torch.equal(mixed.states_BTN[row], source.states_BTN[0])
        assert torch.equal(mixed.mask_BT[row], source.mask_BT[0])
    moved = both.to(torch.device("meta"))
    assert moved.states_BTN.is_meta and moved.mask_BT.is_meta


def test_no_text_keeps_the_texts_mask() -> None:
    """The reference masks the unconditional half as the conditional one."""
    model, text = _teacher(), left_padded(*encoded())
    nothing = model.null_like(text)
    assert isinstance(nothing, TextCondition)
    assert torch.equal(nothing.mask_BT, text.mask_BT)
    assert isinstance(model.cls_embedding.uncond_embedding, Tensor)
    assert torch.equal(nothing.states_BTN[2], model.cls_embedding.uncond_embedding)


def test_what_stands_at_the_padding_changes_nothing() -> None:
    """Not in the encoder's output, nor (if it were not cleared) in the condition itself."""
    model, tokens = _teacher(), torch.randint(16, (4, 9))
    clean, dirty = (left_padded(*encoded(g)) for g in (1.0, 50.0))
    assert torch.equal(model(tokens, clean), model(tokens, dirty))
    noisy = TextCondition(torch.where(clean.mask_BT[..., None], clean.states_BTN, 3.0), clean.mask_BT)
    # Without a single word the last padding position, from which the image starts, sees itself.
    worded = [b for b, n in enumerate(LENGTHS) if n]
    assert torch.allclose(model(tokens, clean)[worded], model(tokens, noisy)[worded], atol=1e-5)
    word = TextCondition(clean.states_BTN.clone(), clean.mask_BT)
    word.states_BTN[:, -1] += 1.0
    assert not torch.allclose(model(tokens, clean)[worded], model(tokens, word)[worded], atol=1e-2)


def test_text_prefill_equals_stepwise_decoding_equals_teacher_forcing() -> None:
    model, tokens, text = _teacher(), torch.randint(16, (4, 9)), left_padded(*encoded())
    forced = model(tokens, text)
    assert forced.isfinite().all()
    stepwise, prefilled = model.new_cache(4), model.new_cache(4)
    for step in range(9):
        assert torch.allclose(
            model.block_logits(tokens, text, step, stepwise)[:, 0], forced[:, step], atol=2e-4
        )
    for step in (4, 8):  # the second jump is from a cache that is not empty
        jumped = model.block_logits(tokens, text, step, prefilled)
        assert torch.allclose(jumped[:, 0], forced[:, step], atol=2e-4)


def test_a_text_alone_equals_the_same_text_in_a_batch() -> None:
    """The teacher's plan with guidance, texts of four lengths, idle rows beside them."""

    class Codes:
        codebook_VC = torch.eye(16)[:, :4] + torch.arange(16)[:, None]

    model, text = _teacher(), left_padded(*encoded())
    draw = LogitSettings(3.0, top_k=8)
    sampler = Sampler(TEXT.layout, Codes(), None, model, draw=draw)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 9, 4, generator=generator)
    uniform = torch.rand(4, 9, generator=generator)
    whole = run_plan(sampler, teacher_plan(9), text, noise, uniform)
    for b in range(4):
        one = slice(b, b + 1)
        alone = text.select(one)
        assert torch.equal(run_plan(sampler, teacher_plan(9), alone, noise[one], uniform[one])[0], whole[b])


def test_a_student_of_texts_runs_and_reads_them() -> None:
    """None was ever released; the flag, the mask and the embedding head are ours."""
    model = LlamaGenStudent(TEXT).eval().requires_grad_(False)
    redraw(model, 1)
    noise, step = torch.randn(4, 9, 4), torch.tensor([0, 3, 5, 8])
    codes, logits = model.predict(noise, left_padded(*encoded()), step)
    assert codes.shape == (4, 9, 4) and logits.shape == (4, 9, 16)
    assert codes.isfinite().all() and logits.isfinite().all()
    other = left_padded(*encoded())
    other.states_BTN[:, -1] += 1.0
    assert not torch.allclose(model.predict(noise, other, step)[1], logits, atol=1e-2)


@pytest.mark.parametrize("text_model", [True, False])
def test_the_wrong_kind_of_condition_is_refused(text_model: bool) -> None:
    cfg = TEXT if text_model else LlamaGenConfig(1, 2, 16, 16, 4, 3, 7, hidden_multiple=8)
    cond = ClassCondition(torch.tensor([1])) if text_model else left_padded(*encoded())
    with pytest.raises(InvalidRequestError, match="text states" if text_model else "class indices") as caught:
        LlamaGenTeacher(cfg)(torch.zeros(len(cond), 9, dtype=torch.long), cond)
    assert caught.value.param == "condition"
