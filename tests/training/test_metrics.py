"""Each measure against a value that can be written down, and against its definition in plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dd_core.errors import InvalidRequestError
from training.metrics.features import legacy_resize, resize_matrix
from training.metrics.fid import (
    Gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from training.metrics.linear_probe import LinearProbe


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_moments(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Points whose sample mean and covariance are exactly these."""
    x = _normal(count, len(mean), seed=seed)
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (count - 1)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ whitened).T + mean


def test_frechet_of_diagonal_gaussians() -> None:
    """Commuting covariances: ‖Δμ‖² + Σ (√a − √b)²."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.25]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    first = _with_moments(torch.zeros(3).double(), a.diag(), 40, seed=1)
    second = _with_moments(shift, b.diag(), 70, seed=2)
    expected = 1 + 4 + 0.25 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(Gaussian.of(first), second) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_gaussians_that_do_not_commute() -> None:
    """For 2×2 matrices tr √M = √(tr M + 2 √det M); a diagonal short cut would fail here."""
    a = torch.tensor([[2.0, 1.2], [1.2, 1.0]]).double()
    b = torch.tensor([[1.0, -0.6], [-0.6, 3.0]]).double()
    cross = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a @ b))))
    zero = torch.zeros(2).double()
    found = frechet_distance(_with_moments(zero, a, 30, seed=1), _with_moments(zero, b, 50, seed=2))
    assert found == pytest.approx(float(a.trace() + b.trace()) - 2 * cross, rel=1e-9)
    assert abs(found - float((a.diag().sqrt() - b.diag().sqrt()).square().sum())) > 0.1


def test_frechet_with_fewer_images_than_features() -> None:
    """Singular covariances: the distance of a set to itself is 0, and to a shifted copy the shift."""
    x = _normal(10, 64).float()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x, x + 0.5) == pytest.approx(64 * 0.25, abs=1e-4)


def test_kernel_distance_is_its_definition() -> None:
    """Of one subset, which is half of the smaller set, in loops without i = j."""
    x, y = _normal(9, 5, seed=1), _normal(7, 5, seed=2) + 0.3

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 5 + 1) ** 3

    generator = torch.Generator().manual_seed(4)
    chosen = [s[torch.randperm(len(s), generator=generator)[:3]] for s in (x, y)]
    within = sum(k(s[i], s[j]) for s in chosen for i, j in itertools.permutations(range(3), 2)) / 6
    across = sum(k(a, b) for a, b in itertools.product(*chosen)) / 9
    mean, deviation = kernel_distance(x, y, subsets=1, seed=4)
    assert mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_the_spread_of_a_small_set_is_not_nothing() -> None:
    x, y = _normal(40, 4, seed=1), _normal(40, 4, seed=2)
    assert kernel_distance(x, y)[1] > 0.01


def test_kernel_distance_has_no_bias() -> None:
    """Mean over 200 pairs of equal distributions is 0 within 4 standard errors (odds 1 in 16,000).

    With the diagonal left in, it would be about 0.5, hundreds of standard errors away.
    """
    found = [
        kernel_distance(_normal(40, 4, seed=2 * s), _normal(40, 4, seed=2 * s + 1), subsets=1)[0]
        for s in range(200)
    ]
    values = torch.tensor(found)
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(200)


def test_kernel_distance_sees_a_shift() -> None:
    x, y = _normal(400, 8, seed=1), _normal(300, 8, seed=2)
    same, deviation = kernel_distance(x, y, subsets=20, size=100)
    shifted, _ = kernel_distance(x, y + 0.5, subsets=20, size=100)
    assert abs(same) < deviation
    assert shifted > 5 * deviation
    assert kernel_distance(x, y, subsets=20, size=100) == (same, deviation)


def test_inception_score_of_known_probabilities() -> None:
    one_hot = torch.eye(5).repeat(20, 1)
    assert inception_score(one_hot)[0] == pytest.approx(5)
    assert inception_score(torch.full((30, 4), 0.25))[0] == pytest.approx(1)
    assert inception_score(one_hot[:1].repeat(30, 1))[0] == pytest.approx(1)
    # Two kinds of row, (a, 1−a) and its mirror: the mean is ½, the score 2 · exp(−entropy).
    a = 0.9
    rows = torch.tensor([[a, 1 - a], [1 - a, a]]).repeat(50, 1)
    entropy = -(a * math.log(a) + (1 - a) * math.log(1 - a))
    mean, deviation = inception_score(rows)
    assert mean == pytest.approx(2 * math.exp(-entropy), rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-6)


def test_inception_score_takes_its_parts_in_order() -> None:
    """Each part has a marginal of its own: parts of one class each score 1, all in one part K."""
    sorted_rows = torch.eye(4).repeat_interleave(10, 0)
    assert inception_score(sorted_rows, splits=4)[0] == pytest.approx(1)
    assert inception_score(sorted_rows, splits=1)[0] == pytest.approx(4)


def test_precision_and_recall_of_clouds() -> None:
    x = _normal(300, 3, seed=1)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    precision, recall = precision_recall(x, _normal(300, 3, seed=2))
    assert precision > 0.8
    assert recall > 0.8


def test_precision_and_recall_tell_collapse_from_noise() -> None:
    """Few modes: all images plausible, most of the real ones missed. The first argument is the real set."""
    real = _normal(500, 2, seed=1)
    collapsed = real[:1] + 0.01 * _normal(500, 2, seed=2)
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.9
    assert recall < 0.1
    assert precision_recall(collapsed, real) == (recall, precision)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_precision_and_recall_are_their_definition(chunk: int) -> None:
    real, other = _normal(23, 4, seed=1).float() + 30, _normal(31, 4, seed=2).float() + 30.5

    def inside(manifold: Tensor, points: Tensor) -> float:
        radius = torch.cdist(manifold.double(), manifold.double()).sort(dim=1).values[:, 3]  # 0 is itself
        return float((torch.cdist(points.double(), manifold.double()) <= radius).any(1).double().mean())

    found = precision_recall(real, other, chunk=chunk)
    assert found == pytest.approx((inside(real, other), inside(other, real)))
    assert 0 < found[0] < 1


@pytest.mark.parametrize(
    ("measure", "least"), [(frechet_distance, 2), (kernel_distance, 2), (precision_recall, 4)]
)
def test_too_few_images_or_other_features_are_refused(measure: object, least: int) -> None:
    assert callable(measure)
    enough = _normal(least, 3)
    measure(enough, enough)
    for real, other in ((enough, enough[1:]), (enough[1:], enough), (enough, enough[:, :2])):
        with pytest.raises(InvalidRequestError) as caught:
            measure(real, other)
        assert caught.value.param in ("images", "features")


def test_rows_that_are_no_probabilities_are_refused() -> None:
    for rows in (torch.ones(4, 3), torch.tensor([[1.5, -0.5]]), torch.zeros(0, 3)):
        with pytest.raises(InvalidRequestError):
            inception_score(rows)


def test_legacy_resize_of_a_ramp() -> None:
    """Target i reads source i · in / out: two pixels to four is 0, ½, 1 and the clamped edge."""
    assert resize_matrix(2, 4).tolist() == [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    ramp = torch.tensor([[0, 10], [100, 110]], dtype=torch.uint8).expand(1, 3, 2, 2)
    found = legacy_resize(ramp, 4)
    assert found.shape == (1, 3, 4, 4)
    assert found[0, 2].tolist() == [
        [0, 5, 10, 10],
        [50, 55, 60, 60],
        [100, 105, 110, 110],
        [100, 105, 110, 110],
    ]
    # Today's usual convention shifts by half a pixel, and would give other features.
    usual = F.interpolate(ramp.float(), (4, 4), mode="bilinear", align_corners=False)
    assert usual[0, 0, 0].tolist() == [0, 2.5, 7.5, 10]


def test_legacy_resize_to_a_size_that_divides_nothing() -> None:
    """3 → 2 reads positions 0 and 1.5; 32 → 299 its last at 298 · 32 / 299 = 31.893, clamped to 31."""
    assert resize_matrix(3, 2).tolist() == [[1, 0, 0], [0, 0.5, 0.5]]
    matrix = resize_matrix(32, 299)
    assert torch.allclose(matrix.sum(1), torch.ones(299).double())
    assert matrix[298, 31] == 1
    assert matrix[100, 10] == pytest.approx(1 - (100 * 32 / 299 - 10))
    assert torch.equal(
        legacy_resize(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)) - 128, torch.zeros(1, 3, 299, 299)
    )


def test_probe_learns_classes_and_says_how_well() -> None:
    """Three clouds far apart, and the same with a fifth of the labels wrong in the held-out part."""
    labels = torch.arange(300) % 3
    features = (_normal(300, 6) + 8 * torch.eye(3, 6).double()[labels]).float()
    probe = LinearProbe(features, labels, 3)
    assert probe.accuracy == 1.0
    probability = probe(features)
    assert torch.allclose(probability.sum(1), torch.ones(300).double())
    assert torch.equal(probability.argmax(1), labels)
    assert inception_score(probability, splits=1)[0] == pytest.approx(3, abs=0.1)
    wrong = labels.clone()
    held = torch.arange(4, 300, 5)
    wrong[held[::5]] = (wrong[held[::5]] + 1) % 3
    assert LinearProbe(features, wrong, 3).accuracy == pytest.approx(0.8)


def test_probe_refuses_what_it_cannot_learn_from() -> None:
    features = _normal(20, 4).float()
    for labels, classes in ((torch.arange(20), 10), (torch.zeros(19, dtype=torch.long), 10)):
        with pytest.raises(InvalidRequestError):
            LinearProbe(features, labels, classes)
    with pytest.raises(InvalidRequestError, match="at least 10"):
        LinearProbe(features[:9], torch.zeros(9, dtype=torch.long), 10)
