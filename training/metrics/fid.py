"""Distances between sets of images, from their features. Plain functions on tensors.

The real set comes first. FID grows as the sets shrink (5,000 real images against 5,000 others
already measure 10.3) and KID does not, so a figure means nothing without its number of images.

Shapes: N generated (or second) set, M real (or first) set, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dd_core.errors import InvalidRequestError


@dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and covariance `[D, D]` (divided by N − 1) of features, in float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features_ND: Tensor) -> Gaussian:
        """Raises InvalidRequestError: fewer than two images."""
        _need(features_ND, 2)
        x = features_ND.double()
        mean = x.mean(0)
        x = x - mean
        return cls(mean, x.T @ x / (len(x) - 1), len(x))

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, `[D, D]`."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return root


def frechet_distance(real: Tensor | Gaussian, other: Tensor | Gaussian) -> float:
    """FID (Heusel et al. 2017): ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½).

    The trace of the root is Σ √λ over the eigenvalues λ of the symmetric Σ₁^½ Σ₂ Σ₁^½, in
    float64, so that covariances of few images, which are singular, do no harm. Symmetric.

    Args:
        real: features `[M, D]`, or their `Gaussian` (whose root is then computed only once).
        other: features `[N, D]`, or their `Gaussian`.

    Raises:
        InvalidRequestError: fewer than two images in a set, or different D.
    """
    a = real if isinstance(real, Gaussian) else Gaussian.of(real)
    b = other if isinstance(other, Gaussian) else Gaussian.of(other)
    if a.mean.shape != b.mean.shape:
        raise InvalidRequestError(f"feature sizes differ: {len(a.mean)} and {len(b.mean)}", param="features")
    product = a.root @ b.covariance @ a.root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return float(distance)


def kernel_distance(
    real_MD: Tensor, other_ND: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): the unbiased squared MMD with k(x, y) = (x·y / D + 1)³.

    MMD² = mean_{i≠j} k(xᵢ, xⱼ) + mean_{i≠j} k(yᵢ, yⱼ) − 2 mean_{i,j} k(xᵢ, yⱼ), averaged over
    random subsets of `size` images of each set (at most half of the smaller set). Its expectation
    is 0 for equal distributions and does not depend on the number of images; a single value
    can be negative.

    Returns:
        the mean over the subsets, and their standard deviation.

    Raises:
        InvalidRequestError: fewer than two images in a set, or different D.
    """
    _need(real_MD, 2)
    _need(other_ND, 2)
    _same_size(real_MD, other_ND)
    # Half a set at most: subsets that are the whole set would all be the same, and their spread nothing.
    take = max(2, min(size, min(len(real_MD), len(other_ND)) // 2))
    generator = torch.Generator().manual_seed(seed)
    dimensions = real_MD.shape[1]
    values = []
    for _ in range(subsets):
        x = real_MD[torch.randperm(len(real_MD), generator=generator)[:take]]
        y = other_ND[torch.randperm(len(other_ND), generator=generator)[:take]]
        xx, yy, xy = ((a @ b.T / dimensions + 1).double().pow(3) for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (take * (take - 1))
        values.append(within - 2 * xy.mean())
    found = torch.stack(values)
    return float(found.mean()), float(found.std(correction=0))


def inception_score(probability_NK: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Salimans et al. 2016: exp(mean over x of KL(p(y|x) ‖ p(y))), p(y) = mean over x of p(y|x).

    1 when every image has the same classes, at most K. The name belongs to the 1,008 classes of
    the original network; over any other classifier it is a score of that classifier.

    Args:
        probability_NK: rows that sum to 1.
        splits: the images in order are split into this many parts; fewer where N is small.

    Returns:
        mean and standard deviation over the parts.

    Raises:
        InvalidRequestError: no image, or rows that are no probabilities.
    """
    _need(probability_NK, 1)
    p = probability_NK.double()
    if bool((p < 0).any()) or not torch.allclose(p.sum(1), torch.ones(len(p), dtype=p.dtype), atol=1e-4):
        raise InvalidRequestError("rows must be probabilities that sum to 1", param="probability")
    scores = []
    for part in p.tensor_split(min(splits, len(p))):
        marginal = part.mean(0, keepdim=True)
        # xlogy is 0 at p = 0, and where p > 0 the marginal is positive too.
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1)
        scores.append(divergence.mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))


def precision_recall(
    real_MD: Tensor, other_ND: Tensor, *, neighbours: int = 3, chunk: int = 1000
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    A set's manifold is the union of balls around its points, each as wide as the distance to
    the point's k-th nearest neighbour in the same set. Precision is the share of `other` inside
    the manifold of `real`; recall the share of `real` inside that of `other`. Both depend on how
    many images there are, so compare only equal numbers.

    Returns:
        precision, recall, each in [0, 1].

    Raises:
        InvalidRequestError: a set with no more than `neighbours` images, or different D.
    """
    _need(real_MD, neighbours + 1)
    _need(other_ND, neighbours + 1)
    _same_size(real_MD, other_ND)
    # ‖x‖² + ‖y‖² − 2 x·y loses digits where points are far from the origin: move it.
    centre = real_MD.mean(0)
    real, other = real_MD - centre, other_ND - centre
    real_radius, other_radius = (_radius(x, neighbours, chunk) for x in (real, other))
    inside = torch.zeros(len(other), dtype=torch.bool)
    covered = []
    for part, radius in zip(torch.split(real, chunk), torch.split(real_radius, chunk), strict=True):
        distance = _squared(part, other)
        inside |= (distance <= radius[:, None]).any(0)
        covered.append((distance <= other_radius[None]).any(1))
    return float(inside.double().mean()), float(torch.cat(covered).double().mean())


def _radius(x_ND: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Squared distance of each point to its k-th nearest neighbour, itself not counted, `[N]`."""
    found = []
    for start in range(0, len(x_ND), chunk):
        distance = _squared(x_ND[start : start + chunk], x_ND)
        rows = torch.arange(len(distance))
        distance[rows, start + rows] = float("inf")
        found.append(distance.kthvalue(neighbours, dim=1).values)
    return torch.cat(found)


def _squared(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    squares = x_ND.square().sum(1)[:, None] + y_MD.square().sum(1)[None]
    return squares.addmm(x_ND, y_MD.T, alpha=-2).clamp_(min=0)


def _need(x: Tensor, least: int) -> None:
    if x.ndim != 2 or len(x) < least:
        raise InvalidRequestError(
            f"needs [N, D] with N at least {least}, got {list(x.shape)}", param="images"
        )


def _same_size(real_MD: Tensor, other_ND: Tensor) -> None:
    if real_MD.shape[1] != other_ND.shape[1]:
        raise InvalidRequestError(
            f"feature sizes differ: {real_MD.shape[1]} and {other_ND.shape[1]}", param="features"
        )
