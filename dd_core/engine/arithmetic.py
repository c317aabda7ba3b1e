"""The arithmetic of inference by name: the types of weights and products, and what they cost in exactness.

    exact32   float32; the bytes of the reference models wherever those are narrow
    bf16      bfloat16 products of trunk and decoder
    fp16      float16 products of trunk and decoder
    auto      `choose`

In all of them the residual stream, norms, softmax, f̂, both heads and the argmax are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from dd_core.errors import InvalidRequestError
from dd_core.runtime import native_bfloat16, native_float16

ArithmeticName = Literal["auto", "exact32", "bf16", "fp16"]
NAMES = get_args(ArithmeticName)


@dataclass(frozen=True)
class Arithmetic:
    """The types that a sampler is prepared in.

    Args:
        weights: of the transformers' products, and of the keys and values that a teacher keeps.
        decoder: of the decoder's convolutions.
        folds_narrow: decoders of few channels are folded as well: they gain little, and would lose the bytes
            that they have in float32.
    """

    name: str
    weights: torch.dtype
    decoder: torch.dtype
    folds_narrow: bool


EXACT32 = Arithmetic("exact32", torch.float32, torch.float32, folds_narrow=False)
BF16 = Arithmetic("bf16", torch.bfloat16, torch.bfloat16, folds_narrow=True)
FP16 = Arithmetic("fp16", torch.float16, torch.float16, folds_narrow=True)
_NAMED = {a.name: a for a in (EXACT32, BF16, FP16)}


def choose(name: str, device: torch.device, exact: bool = True) -> Arithmetic:
    """The arithmetic of a name on `device`.

    `auto` is float32 where bytes are promised (`exact`), since they are promised across machines of a kind
    and starts of the server. Else it is bfloat16 where the device multiplies it in hardware.

    Raises:
        InvalidRequestError: an unknown name, or a type that `device` would emulate.
    """
    if name == "auto":
        return BF16 if not exact and native_bfloat16(device) else EXACT32
    if name not in _NAMED:
        raise InvalidRequestError(
            f"arithmetic must be one of {', '.join(NAMES)}, not {name!r}", param="arithmetic"
        )
    arithmetic = _NAMED[name]
    native = {torch.bfloat16: native_bfloat16, torch.float16: native_float16}.get(arithmetic.weights)
    if native is not None and not native(device):
        raise InvalidRequestError(
            f"arithmetic {name} is not in the hardware of this {device.type}, which would emulate it; "
            "exact32 is everywhere, and auto takes what there is",
            param="arithmetic",
        )
    return arithmetic
