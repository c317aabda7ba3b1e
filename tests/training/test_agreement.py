"""The right caption of 100: found when pictures follow their prompts, and not by a blind guess."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core.errors import InvalidRequestError
from tests.training.helpers import pictures_like
from tests.training.test_stages import RandomLpips
from training.metrics import caption_retrieval as agreement
from training.metrics.caption_retrieval import Agreement, CaptionJudge, picture_features, sentences


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor, list[str]]:
    """200 pictures of 100 concepts, whose features are a noisy linear image of their sentences."""
    generator = torch.Generator().manual_seed(0)
    sentence = torch.nn.functional.normalize(torch.randn(100, 24, generator=generator), dim=-1)
    sentence = sentence.repeat_interleave(2, 0)
    turn = torch.randn(24, 24, generator=generator)
    pictures = sentence @ turn + 0.05 * torch.randn(200, 24, generator=generator)
    monkeypatch.setattr(agreement, "picture_features", lambda images, _: images)
    return pictures, sentence, [f"c{i // 2}" for i in range(200)]


def test_a_right_picture_is_found_and_a_blind_one_is_not(world: tuple[Tensor, Tensor, list[str]]) -> None:
    pictures, sentence, concepts = world
    judge = CaptionJudge.learned(pictures, sentence, concepts, steps=150)
    score = Agreement(judge, None, sentence, concepts)  # type: ignore[arg-type]
    labels = torch.arange(200)
    assert score(pictures, labels) > 0.9
    wrong = (labels + 60) % 200  # pictures of other concepts
    assert score(pictures[wrong], labels) < 0.1
    assert score(pictures.mean(0).expand(200, -1), labels) < 0.05  # one picture for every prompt
    assert score(pictures, labels) == score(pictures, labels)


def test_a_judge_that_was_kept_judges_as_before(world: tuple[Tensor, Tensor, list[str]]) -> None:
    judge = CaptionJudge.learned(*world, steps=5)
    again = CaptionJudge.kept(judge.state_dict())
    assert torch.equal(again(world[0]), judge(world[0]))
    assert not torch.equal(CaptionJudge.learned(*world, steps=0)(world[0]), judge(world[0]))


def test_candidates_are_of_other_concepts_and_the_right_one_is_first(
    world: tuple[Tensor, Tensor, list[str]],
) -> None:
    pictures, sentence, concepts = world
    score = Agreement(CaptionJudge.learned(pictures, sentence, concepts, steps=0), None, sentence, concepts)  # type: ignore[arg-type]
    for i, candidates in enumerate(score.candidates):
        assert candidates[0] == i and len(candidates) == 100
        assert all(concepts[k] != concepts[i] for k in candidates[1:].tolist())


def test_what_cannot_be_judged_is_refused(world: tuple[Tensor, Tensor, list[str]]) -> None:
    pictures, sentence, concepts = world
    with pytest.raises(InvalidRequestError, match="each picture"):
        CaptionJudge.learned(pictures, sentence[:5], concepts)
    judge = CaptionJudge.learned(pictures, sentence, concepts, steps=0)
    with pytest.raises(InvalidRequestError, match="two concepts"):
        Agreement(judge, None, sentence, ["one"] * 200)  # type: ignore[arg-type]


def test_features_depend_on_the_picture_alone(tmp_path: Path) -> None:
    lpips, images = RandomLpips(tmp_path), pictures_like(5)
    features = picture_features(images, lpips, batch=5)
    assert features.shape[0] == 5
    torch.testing.assert_close(picture_features(images[2:3], lpips), features[2:3], rtol=1e-2, atol=1e-3)


def test_a_sentence_is_the_mean_of_its_own_states() -> None:
    states, mask = torch.randn(2, 3, 4), torch.tensor([[False, True, True], [True, True, True]])
    found = sentences(states, mask)
    torch.testing.assert_close(found[0], torch.nn.functional.normalize(states[0, 1:].mean(0), dim=-1))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))
