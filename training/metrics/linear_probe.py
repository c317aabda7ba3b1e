"""A linear classifier on Inception features, for what the Inception file cannot say.

The file has no classifier of its own, so the Inception score proper (over 1,008 ImageNet
classes) cannot be computed from it. A softmax layer trained on features of real images gives
two figures instead, under names of their own: the *classifier score*, the same equation over
the data's own classes, and the *class accuracy*, the share of images that the layer gives the
class that was asked for.

Shapes: N images, D features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dd_core.errors import InvalidRequestError

_PENALTIES = (1e-1, 1e-2, 1e-3)
_HELD_OUT = 5  # every fifth image measures the probe and does not train it


class LinearProbe:
    """softmax(W (x − μ) / σ + b), fitted by L-BFGS with a penalty on ‖W‖².

    Every fifth image is not trained on. `penalty` is the one of `_PENALTIES` with the lowest
    cross entropy there (a score of probabilities needs them calibrated, which accuracy does not
    ask for), and `accuracy` what the probe then reaches there. Deterministic.

    Raises:
        InvalidRequestError: too few images, or labels outside `0..classes-1`.
    """

    def __init__(self, features_ND: Tensor, label_N: Tensor, classes: int) -> None:
        if len(features_ND) < 2 * _HELD_OUT or len(features_ND) != len(label_N):
            raise InvalidRequestError(
                f"a probe needs at least {2 * _HELD_OUT} images, each with a label; "
                f"got {len(features_ND)} and {len(label_N)} labels",
                param="features",
            )
        if int(label_N.min()) < 0 or int(label_N.max()) >= classes:
            raise InvalidRequestError(f"labels must lie in 0..{classes - 1}", param="labels")
        held = torch.arange(len(features_ND)) % _HELD_OUT == _HELD_OUT - 1
        self.mean = features_ND[~held].mean(0)
        self.scale = features_ND[~held].std(0).clamp(min=1e-3)
        x, y = (features_ND - self.mean) / self.scale, label_N
        weight = torch.zeros(classes, x.shape[1] + 1)
        lowest = float("inf")
        for penalty in _PENALTIES:
            weight = _fit(x[~held], y[~held], weight, penalty)
            loss = float(F.cross_entropy(_logits(x[held], weight), y[held]))
            if loss < lowest:
                lowest, self.penalty, self.weight = loss, penalty, weight
        self.accuracy = float((_logits(x[held], self.weight).argmax(1) == y[held]).double().mean())

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Features `[N, D]` → class probabilities `[N, K]`, float64."""
        return _logits((features_ND - self.mean) / self.scale, self.weight).double().softmax(1)


def _logits(x_ND: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x_ND, weight[:, :-1], weight[:, -1])


def _fit(x_ND: Tensor, y_N: Tensor, start: Tensor, penalty: float) -> Tensor:
    """Minimises cross entropy + penalty / 2 · ‖W‖² from `start`."""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(_logits(x_ND, weight), y_N) + penalty / 2 * weight[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach()
