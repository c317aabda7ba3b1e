"""FID of a plan against one set of real images: a figure to watch while a model is trained.

`training.measure` and `training.stages.evaluate` measure more of a finished model.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from dd_core.plan import Plan
from dd_core.sampling import Sampler
from training import parallel
from training.data.conditions import Conditions
from training.data.images import ImageSet
from training.metrics.chunks import Chunks
from training.metrics.features import Extractor, content_hash, features_of, real_store
from training.metrics.fid import Gaussian, frechet_distance
from training.metrics.rows import fingerprint_of


@dataclass
class PlanFid:
    """Real images that plans are held against; their features are computed once it is called.

    Args:
        images: how many a plan draws; image i has the label i mod `conditions.count`, the key (seed, i).
        folder: keeps features of the plans' images, a chunk at a time: a measurement that was killed goes
            on with its chunk.
    """

    reference: ImageSet
    conditions: Conditions
    extractor: Extractor
    folder: Path
    images: int
    batch: int
    seed: int

    @cached_property
    def real(self) -> Gaussian:
        """Mean and covariance of the real images' features."""
        return Gaussian.of(features_of(self.reference.images, self.extractor, real_store(), "reference"))

    def fingerprint(self, sampler: Sampler, plan: Plan, weights: str) -> str:
        """A hash of all that the FID follows from; `weights` is one of the sampler's models."""
        return fingerprint_of({**self._drawn(sampler, plan, weights), "images": self.images, **self._against})

    def draw(self, sampler: Sampler, plan: Plan, weights: str) -> None:
        """Draw the images that are missing; of several ranks, all of which call this, each its share.

        They share the real images, too: the features of those are there when rank 0 asks for the FID.
        """
        if parallel.connected():
            _ = self.real
        self._chunks(sampler, plan, weights).draw(
            sampler, plan, self.conditions, self.extractor, seed=self.seed, batch=self.batch
        )

    def __call__(self, sampler: Sampler, plan: Plan, weights: str) -> float:
        """The FID of images that were drawn, whose features are kept until `forget`."""
        return frechet_distance(self.real, self._chunks(sampler, plan, weights).features())

    def forget(self) -> None:
        """Remove the features of images whose FID is written down."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _chunks(self, sampler: Sampler, plan: Plan, weights: str) -> Chunks:
        drawn = fingerprint_of(self._drawn(sampler, plan, weights))
        return Chunks(self.folder / plan.name, self.images, drawn, keep=False)

    def _drawn(self, sampler: Sampler, plan: Plan, weights: str) -> dict[str, object]:
        return {
            "network": self.extractor.fingerprint,
            "precision": self.extractor.precision,
            "weights": weights,
            "plan": asdict(plan),
            "draw": repr(sampler.draw),
            "flow": repr(sampler.flow),
            "seed": self.seed,
            "classes": self.conditions.count,
        }

    @cached_property
    def _against(self) -> dict[str, object]:
        return {"reference": content_hash(self.reference.images, self.reference.labels)}
