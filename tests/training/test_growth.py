"""A deeper student: the same function at first, and blocks that learn from the first step on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dd_core.condition import ClassCondition
from dd_core.errors import RecipeError
from dd_core.models.config import LlamaGenConfig
from dd_core.models.llamagen import LlamaGenStudent
from dd_core.models.var import VARStudent
from tests.tiny_var import VAR
from training.stages.growth import deepened

CFG = LlamaGenConfig(
    layers=4, heads=2, dim=16, codebook_size=32, code_dim=4, grid=4, num_classes=5, hidden_multiple=16
)
_NEW = (1, 4)  # of six blocks


def _student() -> LlamaGenStudent:
    torch.manual_seed(3)
    student = LlamaGenStudent(CFG)
    for parameter in student.parameters():
        parameter.data.normal_(std=0.2)
    return student


def _outputs(student: LlamaGenStudent) -> tuple[Tensor, Tensor]:
    noise = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(1))
    return student(noise, ClassCondition(torch.tensor([0, 4, 2])), torch.tensor([0, 7, 0]))


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_a_deeper_student_in_next_scale_order_computes_the_same(layers: int) -> None:
    torch.manual_seed(3)
    student = VARStudent(VAR)
    for parameter in student.parameters():
        parameter.data.normal_(std=0.2)
    noise = torch.randn(2, VAR.layout.num_tokens, VAR.code_dim, generator=torch.Generator().manual_seed(1))
    given = noise, ClassCondition(torch.tensor([0, 4])), torch.tensor([0, 2])
    deeper = deepened(student, layers)
    assert isinstance(deeper, VARStudent) and len(deeper.blocks) == layers
    for was, now in zip(student(*given), deeper(*given), strict=True):
        torch.testing.assert_close(now, was)


@pytest.mark.parametrize("layers", [4, 5, 6, 8, 11])
def test_a_deeper_student_computes_the_same(layers: int) -> None:
    student = _student()
    deeper = deepened(student, layers)
    assert len(deeper.layers) == layers and deeper.cfg == replace(CFG, layers=layers)
    for was, now in zip(_outputs(student), _outputs(deeper), strict=True):
        torch.testing.assert_close(now, was)


def test_new_blocks_are_spread_evenly() -> None:
    silent = [
        i for i, block in enumerate(deepened(_student(), 6).layers) if not block.feed_forward.w2.weight.any()
    ]
    assert tuple(silent) == _NEW


def test_new_blocks_learn_from_the_first_step_on() -> None:
    deeper = deepened(_student(), 6)
    _outputs(deeper)[1].square().sum().backward()
    for i in _NEW:
        assert deeper.layers[i].attention.wo.weight.grad.abs().max() > 0
        assert deeper.layers[i].feed_forward.w2.weight.grad.abs().max() > 0


def test_the_student_that_it_began_with_stays_as_it_is() -> None:
    student = _student().requires_grad_(False)
    same = deepened(student, 4)
    assert all(p.requires_grad for p in same.parameters())
    with torch.no_grad():
        same.output.weight.zero_()
    assert student.output.weight.any()


def test_fewer_blocks_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"distill\.layers must be at least the 4 .* got 3") as refused:
        deepened(_student(), 3)
    assert refused.value.param == "distill.layers"
