"""LlamaGen's models prepared for inference: the reference modules, with the blocks' products in another type.

The residual stream, norms, rotation, the input layer and both heads are float32. In exact32 every operation
is the reference's own, so the bytes are too.
"""

from __future__ import annotations

from typing import TypeVar

from dd_core.engine.arithmetic import Arithmetic
from dd_core.engine.layers import shallow, with_products
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher

Model = TypeVar("Model", LlamaGenStudent, LlamaGenTeacher)


def prepare_llamagen(model: Model, arithmetic: Arithmetic) -> Model:
    """The model with its blocks' products in the arithmetic's type, and so its keys and values."""
    copy = shallow(model)
    assert isinstance(copy, type(model))
    copy._modules["layers"] = with_products(model.layers, arithmetic)
    return copy
