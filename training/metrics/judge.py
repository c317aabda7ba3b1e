"""Figures of sets of images, each held against the same real ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from training.data.images import ImageSet
from training.metrics.caption_retrieval import Prompted
from training.metrics.features import Extractor, content_hash, features_of, real_store
from training.metrics.fid import (
    Gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from training.metrics.linear_probe import LinearProbe
from training.metrics.report import Row

_VERSION = 2  # raise it when a measure changes, so that no old row survives
MANIFOLD = 10_000  # the most images a set for precision and recall, whose cost is quadratic


@dataclass
class Judge:
    """The real images that every set is held against; features only when a row needs them."""

    reference: ImageSet
    extractor: Extractor
    classes: int
    prompts: Prompted | None = None

    @cached_property
    def identity(self) -> dict[str, object]:
        """What every figure follows from besides the set that it is of."""
        return {
            "version": _VERSION,
            "network": self.extractor.fingerprint,
            "precision": self.extractor.precision,
            "reference": content_hash(self.reference.images, self.reference.labels),
            **({} if self.prompts is None else {"prompts": self.prompts.fingerprint}),
        }

    @cached_property
    def features(self) -> Tensor:
        return features_of(self.reference.images, self.extractor, real_store(), "reference")

    @cached_property
    def gaussian(self) -> Gaussian:
        return Gaussian.of(self.features)

    @cached_property
    def probe(self) -> LinearProbe:
        return LinearProbe(self.features, self.reference.labels, self.classes)

    def measure(
        self,
        name: str,
        kind: str,
        features: Tensor,
        labels: Tensor,
        real: Tensor | None = None,
        answers: Tensor | None = None,
    ) -> Row:
        """A set's row; held against `real` features where given, else the reference.

        `answers` are what its pictures are taken for, which a figure of prompts is of.
        """
        gaussian = self.gaussian if real is None else Gaussian.of(real)
        against = self.features if real is None else real
        equal = min(len(against), len(features), MANIFOLD)
        kid, kid_std = kernel_distance(against, features)
        precision, recall = precision_recall(against[:equal], features[:equal])
        row = Row(
            name=name,
            kind=kind,
            images=len(features),
            reference_images=len(against),
            fid=frechet_distance(gaussian, features),
            kid=kid,
            kid_std=kid_std,
            precision=precision,
            recall=recall,
            manifold_images=equal,
        )
        return replace(row, **self._by_condition(features, labels, answers))

    def answers(self, features: Tensor, labels: Tensor, image_NHW3: Tensor) -> Tensor:
        """What pictures are taken for: a class `[N]`, or where texts are the condition a prompt's number."""
        if self.prompts is not None:
            return self.prompts.agreement.closest(image_NHW3.permute(0, 3, 1, 2).contiguous(), labels)
        return self.probe(features).argmax(1)

    def _by_condition(self, features: Tensor, labels: Tensor, answers: Tensor | None) -> dict[str, Any]:
        """Figures of how well the condition was kept to: by class, or by prompt."""
        if self.prompts is not None:
            right = None if answers is None else (answers == labels).double().mean().item()
            return {"right_caption": right}
        probability = self.probe(features)
        score, score_std = inception_score(probability)
        return {
            "classifier_score": score,
            "classifier_score_std": score_std,
            "class_accuracy": float((probability.argmax(1) == labels).double().mean()),
            "probe_accuracy": self.probe.accuracy,
        }
