"""Agreement of pictures with their prompts: finding the prompt among a hundred.

    picture ─▶ VGG16 maps, pooled ─▶ small network ─▶ sentence space ◀─ mean of its states ◀─ caption

The small network learns from real pictures and their captions alone, by the contrast of every
picture's caption to all others of a batch. A set's *right caption of 100* is the share of pictures that
lie closer to their own prompt than to 99 others, which name other concepts: a blind guess reaches
1%, and so does a sampler that ignores its prompt. Real held-out pictures say what can be reached.

Shapes: N pictures, D features, E sentence dimension, M texts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.errors import InvalidRequestError
from dd_core.noise import stream_seed
from dd_core.runtime import mixed_precision
from training.data.conditions import ClassConditions, Conditions
from training.data.images import scaled
from training.losses.lpips import Lpips
from training.optim.loop import one_cycle, update_at

log = logging.getLogger("dd_train")

CANDIDATES = 100
_STEPS, _BATCH, _HIDDEN = 600, 256, 512


@torch.inference_mode()
def picture_features(image_N3HW: Tensor, lpips: Lpips, batch: int = 100) -> Tensor:
    """`[N, D]` of uint8 pictures: each of the five maps, pooled to 2×2."""
    found = []
    for part in torch.split(image_N3HW, batch):
        with mixed_precision(part.device):
            maps = lpips.features(scaled(part))
        found.append(torch.cat([F.adaptive_avg_pool2d(m.float(), 2).flatten(1) for m in maps], 1))
    return torch.cat(found)


def sentences(states_MTE: Tensor, mask_MT: Tensor) -> Tensor:
    """Unit vectors of texts `[M, E]`: the mean of their states."""
    mean = (states_MTE.float() * mask_MT[..., None]).sum(1) / mask_MT.sum(1, keepdim=True)
    return F.normalize(mean, dim=-1)


class CaptionJudge(nn.Module):
    """Picture features → sentence space, as it is before it has learned: `learned` is the way to one.

    `fingerprint` names all that it has learned from, where it was given one.

    Args:
        features, sentence: D and E.
    """

    mean: Tensor
    scale: Tensor
    fingerprint: str = ""

    def __init__(self, features: int, sentence: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.network = nn.Sequential(
            nn.Dropout(0.3),
            nn.Linear(features, _HIDDEN),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Linear(_HIDDEN, sentence),
        )

    @classmethod
    def learned(
        cls, features_ND: Tensor, sentences_NE: Tensor, concepts: Sequence[str], steps: int | None = None
    ) -> CaptionJudge:
        """A judge that knows real pictures and their captions.

        Args:
            features_ND, sentences_NE: of real pictures and of their captions.
            concepts: names what each shows: two pictures of one concept are not set against each other.

        Raises:
            InvalidRequestError: not as many of each.
        """
        if not len(features_ND) == len(sentences_NE) == len(concepts):
            raise InvalidRequestError("a caption and a concept for each picture", param="captions")
        steps = _STEPS if steps is None else steps
        number = {c: i for i, c in enumerate(dict.fromkeys(concepts))}
        concept_N = torch.tensor([number[c] for c in concepts])
        torch.manual_seed(stream_seed(0, 0, "caption-judge"))
        judge = cls(features_ND.shape[1], sentences_NE.shape[1])
        judge.mean, judge.scale = features_ND.mean(0), features_ND.std(0).clamp(min=1e-4)
        optimizer = torch.optim.AdamW(
            [{"params": list(judge.parameters()), "peak": 1e-3}], lr=1e-3, weight_decay=0.05
        )
        x, loss = (features_ND - judge.mean) / judge.scale, torch.zeros(())
        for step in range(steps):
            chosen = torch.randint(len(x), (min(_BATCH, len(x)),))
            score = F.normalize(judge.network(x[chosen]), dim=-1) @ sentences_NE[chosen].T * 20
            same = concept_N[chosen][:, None] == concept_N[chosen]
            score = score.masked_fill(same & ~torch.eye(len(chosen), dtype=torch.bool), float("-inf"))
            loss = F.cross_entropy(score, torch.arange(len(chosen)))
            loss.backward()  # type: ignore[no-untyped-call]
            update_at(optimizer, one_cycle(step, steps, 1.0))
        log.info("caption judge: loss %.3f after %d steps", float(loss.detach()), steps)
        return judge.eval()

    @classmethod
    def kept(cls, state: Mapping[str, Tensor]) -> CaptionJudge:
        """The judge whose `state_dict` was kept."""
        judge = cls(len(state["mean"]), len(state["network.4.bias"]))
        judge.load_state_dict(state)
        return judge.eval()

    @torch.inference_mode()
    def forward(self, features_ND: Tensor) -> Tensor:
        """Unit vectors `[N, E]`."""
        return F.normalize(self.network((features_ND - self.mean) / self.scale), dim=-1)


def learning() -> tuple[int, ...]:
    """What a judge follows from besides the pictures and captions that it learns from."""
    return _STEPS, _BATCH, _HIDDEN


class Agreement:
    """Right caption of 100, for sets whose picture i has prompt `label[i]`.

    Args:
        sentences_ME, concepts: of the prompts.

    Raises:
        InvalidRequestError: fewer than two concepts: there is nothing to choose between.
    """

    def __init__(
        self, judge: CaptionJudge, lpips: Lpips, sentences_ME: Tensor, concepts: Sequence[str]
    ) -> None:
        if len(set(concepts)) < 2:
            raise InvalidRequestError("prompts must name two concepts or more", param="captions")
        self.judge, self.lpips, self.sentences_ME = judge, lpips, sentences_ME
        # The candidates of a prompt are its own and, from a fixed shuffle, others of other concepts.
        generator = torch.Generator().manual_seed(stream_seed(0, 0, "caption-candidates"))
        self.candidates: list[Tensor] = []
        for i, own in enumerate(concepts):
            order = torch.randperm(len(concepts), generator=generator).tolist()
            others = [k for k in order if concepts[k] != own]
            self.candidates.append(torch.tensor([i, *others[: CANDIDATES - 1]]))

    @property
    def among(self) -> int:
        """How many prompts a picture is told from: `CANDIDATES`, or fewer where there are not as many."""
        return min(len(own) for own in self.candidates)

    def __call__(self, image_N3HW: Tensor, label_N: Tensor) -> float:
        """Share of uint8 pictures that lie closest to their own prompt."""
        return (self.closest(image_N3HW, label_N) == label_N).double().mean().item()

    def closest(self, image_N3HW: Tensor, label_N: Tensor) -> Tensor:
        """Number `[N]` of the prompt, among the hundred of each label, that each picture lies closest to."""
        scores = zip(label_N.tolist(), self._scores(image_N3HW, label_N), strict=True)
        return torch.stack([self.candidates[label][score.argmax()] for label, score in scores])

    def margins(self, image_N3HW: Tensor, label_N: Tensor) -> Tensor:
        """By how much `[N]` each picture lies closer to its own prompt than to the next of the others; below
        zero where another is closer. Cosines of the sentence space.
        """
        return torch.stack([score[0] - score[1:].max() for score in self._scores(image_N3HW, label_N)])

    def _scores(self, image_N3HW: Tensor, label_N: Tensor) -> list[Tensor]:
        """Cosines of each picture and the candidates of its label, of which its own is the first."""
        vectors = self.judge(picture_features(image_N3HW, self.lpips))
        return [
            self.sentences_ME[self.candidates[label]] @ vector
            for vector, label in zip(vectors, label_N.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Prompted:
    """Prompts that a model of texts is asked for, and the measure of whether they show.

    `fingerprint` names the prompts and all that the agreement was made of.
    """

    conditions: Conditions
    agreement: Agreement
    fingerprint: str


def asked_for(classes: int, prompts: Prompted | None) -> Conditions:
    """What the pictures of an evaluation are asked for: the prompts, or classes where there are none."""
    return ClassConditions(classes) if prompts is None else prompts.conditions
