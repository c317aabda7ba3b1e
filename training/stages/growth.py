"""A deeper student that computes what the shallower one did, to go on training from.

One pass has to make every token from the noise, and a token hangs on all before it: blocks are the steps in
which it can. A student may so have more of them than its teacher.

    block 0 ─▶ copy of 0 with no output ─▶ block 1 ─▶ block 2 ─▶ copy of 2 with no output ─▶ …
"""

from __future__ import annotations

import torch
from torch import Tensor

from dd_core.errors import RecipeError
from dd_core.models.build import AnyStudent, new_student


def deepened(student: AnyStudent, layers: int) -> AnyStudent:
    """A copy of `student` with `layers` blocks, and the same outputs.

    New blocks are spread evenly. Each is a copy of the one before it whose last matrices, of attention and
    feed-forward, are zero: it adds nothing yet, and what those matrices learn from is of use already.

    Raises:
        RecipeError: fewer blocks than it has.
    """
    old = student.cfg.num_layers
    if layers < old:
        raise RecipeError(
            f"distill.layers must be at least the {old} of the student that it begins with, got {layers}",
            param="distill.layers",
        )
    # What is past the blocks in a list with one entry a block (VAR's has one for the heads) stays last.
    origin = [i * old // layers for i in range(layers)] + [old]
    state: dict[str, Tensor] = {}
    for key, value in student.state_dict().items():
        stack, _, rest = key.partition(".")
        if stack not in student.GROWS:
            state[key] = value
            continue
        number, _, part = rest.partition(".")
        for first, i in enumerate(i for i, before in enumerate(origin) if before == int(number)):
            silent = first and part in student.GROWS[stack]
            state[f"{stack}.{i}.{part}"] = torch.zeros_like(value) if silent else value
    deeper = new_student(student.cfg.with_layers(layers)).to(next(student.parameters()).device)
    deeper.load_state_dict(state)
    return deeper
