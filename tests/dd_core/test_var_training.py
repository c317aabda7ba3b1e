"""What training needs of the VAR family: first weights, a student's start, and a quantiser with gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.codebook import lookup
from dd_core.condition import ClassCondition
from dd_core.models.build import new_student, new_teacher
from dd_core.models.config import VARConfig
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from tests.tiny_var import VAR, VQ, L

LABELS = ClassCondition(torch.tensor([0, 4, 9]))


@pytest.fixture
def tokenizer() -> MultiScaleVQ:
    torch.manual_seed(0)
    return MultiScaleVQ(VQ)


@pytest.fixture
def z(tokenizer: MultiScaleVQ) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    side = VQ.sides[-1] * VQ.downsampling
    images = torch.rand(2, 3, side, side, generator=generator) * 2 - 1
    return tokenizer.encode_continuous(images).detach().requires_grad_()


def test_the_codes_add_up_to_the_quantized_map(tokenizer: MultiScaleVQ, z: Tensor) -> None:
    coded = tokenizer.quantize(z)
    codes = lookup(tokenizer.codebook_VC, coded.tokens_BL)
    assert coded.tokens_BL.shape == (2, L) and coded.vectors_BLC.shape == (2, L, VQ.code_dim)
    torch.testing.assert_close(coded.z, tokenizer.accumulate(codes, len(VQ.sides))[-1])
    torch.testing.assert_close(tokenizer.decode_continuous(coded.z), tokenizer.to_image(codes))


def test_each_vector_is_replaced_by_its_nearest_code(tokenizer: MultiScaleVQ, z: Tensor) -> None:
    coded = tokenizer.quantize(z)
    distance = torch.cdist(coded.vectors_BLC, tokenizer.codebook_VC.expand(2, -1, -1))
    chosen = distance.gather(2, coded.tokens_BL[..., None])[..., 0]
    torch.testing.assert_close(chosen, distance.min(-1).values)


def test_commitment_moves_the_encoder_and_fit_moves_phi(tokenizer: MultiScaleVQ, z: Tensor) -> None:
    coded = tokenizer.quantize(z)
    phi = tokenizer.phi[0].weight
    assert isinstance(phi, Tensor)
    [to_z] = torch.autograd.grad(coded.commitment, [z], retain_graph=True)
    assert to_z.abs().max() > 0
    [to_phi, to_encoder] = torch.autograd.grad(coded.fit, [phi, z], allow_unused=True, retain_graph=True)
    assert to_phi.abs().max() > 0 and to_encoder is None
    assert torch.autograd.grad(coded.commitment, [phi], allow_unused=True) == (None,)
    assert not coded.vectors_BLC.requires_grad


@pytest.mark.parametrize("shared", [False, True])
def test_a_new_teacher_knows_nothing_and_its_blocks_add_next_to_nothing(
    tokenizer: MultiScaleVQ, shared: bool
) -> None:
    torch.manual_seed(2)
    cfg = VARConfig(**{**vars(VAR), "shared_adaln": shared})
    teacher = new_teacher(cfg, tokenizer)
    assert isinstance(teacher, VARTeacher)
    tokens = torch.randint(VAR.codebook_size, (3, L), generator=torch.Generator().manual_seed(3))
    logits = teacher(tokens, LABELS)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert abs(loss.item() - math.log(VAR.codebook_size)) < 0.02


def test_a_student_starts_as_the_teacher(tokenizer: MultiScaleVQ) -> None:
    """Line 1 of Algorithm 2; the level and position of the first scale's token are new (App. B)."""
    torch.manual_seed(2)
    teacher, student = new_teacher(VAR, tokenizer), new_student(VAR)
    assert isinstance(teacher, VARTeacher) and isinstance(student, VARStudent)
    new_level, new_place = student.lvl_embed.weight[1].clone(), student.pos_1LC[0, 1].clone()
    student.from_teacher(teacher, tokenizer.codebook_VC)
    found = student.state_dict()
    for name, value in teacher.state_dict().items():
        if name not in ("lvl_embed.weight", "pos_1LC"):
            assert torch.equal(found[name], value), name
    levels, places = student.lvl_embed.weight, student.pos_1LC[0]
    assert torch.equal(levels[0], teacher.lvl_embed.weight[0]) and torch.equal(levels[1], new_level)
    assert torch.equal(levels[2:], teacher.lvl_embed.weight[1:])
    assert torch.equal(places[0], teacher.pos_1LC[0, 0]) and torch.equal(places[1], new_place)
    assert torch.equal(places[2:], teacher.pos_1LC[0, 1:])
