"""A deeper student that computes what the shallower one did, to go on training from.

One pass has to make every token from the noise, and a token hangs on all before it: blocks are the steps in
which it can. A student may so have more of them than its teacher.

    block 0 ─▶ copy of 0 with no output ─▶ block 1 ─▶ block 2 ─▶ copy of 2 with no output ─▶ …
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dd_core.errors import RecipeError
from dd_core.models.llamagen import LlamaGenStudent

# What a block adds to its input ends in these matrices.
_LAST = ("attention.wo.weight", "feed_forward.w2.weight")


def deepened(student: LlamaGenStudent, layers: int) -> LlamaGenStudent:
    """A copy of `student` with `layers` blocks, and the same outputs.

    New blocks are spread evenly. Each is a copy of the one before it whose last matrices, of attention and
    feed-forward, are zero: it adds nothing yet, and what those matrices learn from is of use already.

    Raises:
        RecipeError: fewer blocks than it has.
    """
    old = student.cfg.layers
    if layers < old:
        raise RecipeError(
            f"distill.layers must be at least the {old} of the student that it begins with, got {layers}",
            param="distill.layers",
        )
    old_state = student.state_dict()
    state = {key: value for key, value in old_state.items() if not key.startswith("layers.")}
    origin = [i * old // layers for i in range(layers)]
    for i, before in enumerate(origin):
        is_new = i > 0 and before == origin[i - 1]
        for key, value in old_state.items():
            if key.startswith(f"layers.{before}."):
                part = key.removeprefix(f"layers.{before}.")
                state[f"layers.{i}.{part}"] = torch.zeros_like(value) if is_new and part in _LAST else value
    deeper = LlamaGenStudent(replace(student.cfg, layers=layers)).to(student.output.weight.device)
    deeper.load_state_dict(state)
    return deeper
