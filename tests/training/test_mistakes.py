"""Replaced tokens that a teacher reads, and what it is to predict after them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.codebook import lookup
from dd_core.condition import ClassCondition
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARTeacher
from tests.tiny_var import SIDES, VQ, L, tiny_var_models
from training.optim.loop import Batches
from training.recipes.named import get_recipe
from training.stages.mistakes import draw_choices, near_codes
from training.stages.teacher import teacher_stage
from training.stages.tokenizer import new_tokenizer

CPU = torch.device("cpu")
IMAGES = 6


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleVQ:
    return tiny_var_models()[0]


@pytest.fixture(scope="module")
def tokens(tokenizer: MultiScaleVQ) -> Tensor:
    """Codes of smooth maps, as an encoder finds them: what a scale leaves, the next ones hold."""
    return tokenizer.quantize(
        torch.randn(IMAGES, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    ).tokens_BL


def whole(tokenizer: MultiScaleVQ, tokens_BL: Tensor) -> Tensor:
    return tokenizer.accumulate(lookup(tokenizer.codebook_VC, tokens_BL), len(SIDES))[-1]


def test_near_codes_are_the_nearest_others() -> None:
    """Of 32 codes on a line: two neighbours, and never the code itself."""
    line = torch.arange(32.0)[:, None].expand(-1, 3)
    near = near_codes(line)
    assert near.shape == (32, 2)
    assert [set(row) for row in near[[0, 7, 31]].tolist()] == [{1, 2}, {6, 8}, {29, 30}]
    assert near_codes(line[:4]).shape == (4, 1), "at least one, of however few"


def test_the_share_of_replaced_tokens_is_drawn_anew_for_each_image() -> None:
    torch.manual_seed(0)
    choices = draw_choices(4_000, 50, torch.zeros(9, 7), 0.4)
    share = (choices >= 0).float().mean(1)
    assert set(choices.unique().tolist()) == set(range(-1, 7))
    assert share.mean() == pytest.approx(0.2, abs=0.01)
    assert share.quantile(0.1) < 0.08 and share.quantile(0.9) > 0.32, "from none to 0.4"


def test_what_is_not_replaced_stays(tokenizer: MultiScaleVQ, tokens: Tensor) -> None:
    near = near_codes(tokenizer.codebook_VC)
    read, target = tokenizer.with_mistakes(tokens, near, torch.full_like(tokens, -1))
    assert torch.equal(read, tokens) and torch.equal(target, tokens)


@pytest.mark.parametrize("scale", range(len(SIDES)))
def test_scales_after_a_replaced_token_make_up_for_it(
    tokenizer: MultiScaleVQ, tokens: Tensor, scale: int
) -> None:
    """One token of one image: to be predicted as it was, and read as another. What follows fits that."""
    near, starts = near_codes(tokenizer.codebook_VC), VQ.layout.starts
    choices = torch.full_like(tokens, -1)
    choices[2, starts[scale]] = 1
    read, target = tokenizer.with_mistakes(tokens, near, choices)
    others = [i for i in range(IMAGES) if i != 2]
    assert torch.equal(read[others], tokens[others]) and torch.equal(target[others], tokens[others])
    stop = starts[scale + 1]
    assert torch.equal(target[2, :stop], tokens[2, :stop])
    assert [i for i in range(L) if read[2, i] != target[2, i]] == [starts[scale]]
    assert read[2, starts[scale]] == near[tokens[2, starts[scale]], 1]
    # What the tokenizer itself would find for the image's map after the tokens that were read.
    goal, codes = whole(tokenizer, tokens[2:3]), lookup(tokenizer.codebook_VC, read[2:3])
    for k in range(scale + 1, len(SIDES)):
        left = tokenizer.at_scale(goal - tokenizer.accumulate(codes, k)[-1], k)
        found = torch.cdist(left, tokenizer.codebook_VC).argmin(-1)
        assert torch.equal(target[2:3, starts[k] : starts[k + 1]], found)


def test_the_read_tokens_add_up_to_nearly_the_same() -> None:
    """Nearer than with the same replacements and nothing made up, where there are codes enough for it."""
    tokenizer = MultiScaleVQ(replace(VQ, codebook_size=1024, z_channels=2, phi_ratio=0.0)).requires_grad_(
        False
    )
    generator = torch.Generator().manual_seed(0)
    tokenizer.set_codes(torch.randn(1024, 2, generator=generator))
    tokens = tokenizer.quantize(2 * torch.randn(IMAGES, 2, 4, 4, generator=generator)).tokens_BL
    near = near_codes(tokenizer.codebook_VC)
    torch.manual_seed(0)
    choices = draw_choices(IMAGES, L, near, 0.5)
    choices[:, VQ.layout.starts[-2] :] = -1  # after the last scale nothing can make up
    read, _ = tokenizer.with_mistakes(tokens, near, choices)
    bare = torch.where(choices >= 0, near[tokens, choices.clamp(min=0)], tokens)
    goal = whole(tokenizer, tokens)
    made_up, left = ((whole(tokenizer, t) - goal).square().mean() for t in (read, bare))
    assert made_up < 0.7 * left


def test_in_raster_order_nothing_makes_up() -> None:
    tokenizer = new_tokenizer(get_recipe("tiny"), CPU)
    tokens = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(0))
    near, choices = near_codes(tokenizer.codebook_VC), torch.full_like(tokens, -1)
    choices[1, 5] = 0
    read, target = tokenizer.with_mistakes(tokens, near, choices)
    assert torch.equal(target, tokens)
    assert (read != tokens).nonzero().tolist() == [[1, 5]] and read[1, 5] == near[tokens[1, 5], 0]


def test_a_teacher_reads_and_predicts_them() -> None:
    """The cross entropy of an update is that of the made-up tokens after the read ones."""
    recipe = get_recipe("var-tiny", ["teacher.batch=8", "teacher.class_dropout=0", "teacher.replaced=0.5"])
    tokenizer = new_tokenizer(recipe, CPU)
    tokens = torch.randint(64, (1, 8, 85), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    stage, _ = teacher_stage(recipe, tokens, labels, tokenizer, CPU)
    model = copy.deepcopy(stage.parts["model"])
    assert isinstance(model, VARTeacher)
    torch.manual_seed(3)
    found = stage.update(0)["cross_entropy"]
    torch.manual_seed(3)
    chosen = Batches(8, 8, recipe.seed).at(0)
    torch.rand(8)  # which classes are dropped
    near = near_codes(tokenizer.codebook_VC)
    choices = draw_choices(8, 85, near, 0.5)
    with torch.no_grad():
        read, target = tokenizer.with_mistakes(tokens[0, chosen], near, choices)
        logits = model(read, ClassCondition(labels[chosen]))
    assert (read != tokens[0, chosen]).any()
    assert found.item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).item(), rel=1e-4
    )
