"""Parts that the prepared models of both families are made of.

Shapes: B batch, S positions, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.engine.arithmetic import Arithmetic


def constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained, on the same memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def free(module: nn.Module) -> None:
    """Give back the memory of a module's weights; it is of no use afterwards."""
    for tensor in module.parameters():
        tensor.data = tensor.data.new_empty(0)


class Product(nn.Module):
    """x Wᵀ + b in the arithmetic's type, whatever the type of x; what is added to it later stays float32.

    In the type that the weights have already it holds them, not copies.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = constant(weight.to(dtype))
        self.bias = None if bias is None else constant(bias.to(dtype))

    @classmethod
    def of(cls, linear: nn.Linear, arithmetic: Arithmetic) -> Product:
        """The product of a layer."""
        return cls(linear.weight, linear.bias, arithmetic.weights)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def shallow(module: nn.Module) -> nn.Module:
    """A module of the same class that shares every part and tensor, and whose parts can be replaced one by
    one without the original's noticing.
    """
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    for registry in ("_modules", "_parameters", "_buffers"):
        copy.__dict__[registry] = dict(module.__dict__[registry])
    return copy


def with_products(module: nn.Module, arithmetic: Arithmetic) -> nn.Module:
    """A copy with a `Product` in place of every linear layer; all else is shared."""
    if isinstance(module, nn.Linear):
        return Product.of(module, arithmetic)
    copy = shallow(module)
    for name, part in module.named_children():
        copy._modules[name] = with_products(part, arithmetic)
    return copy
