"""Work and memory of a recipe's pairs and distillation, counted on its models without weights.

`python -m training.recipes.costs` prints the table of docs/08-training.md. One pass at batch 1 is run under
torch's FLOP counter, which counts matrix products and convolutions: of the transformers with one block and
with two, from which any number follows.
A pair is two teacher passes over all tokens (guidance) and the flow map; an update trains the student (three
times its forward pass), decodes and judges the teacher's picture (once) and the student's (forward, and back
to the pixels: twice). Activations are the tensors that autograd keeps of one sample, in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dd_core.condition import ClassCondition
from dd_core.models.build import AnyTokenizer, new_student, new_teacher, new_tokenizer
from dd_core.models.config import ModelConfig
from training.recipes.named import get_recipe
from training.recipes.published import PUBLISHED
from training.recipes.settings import Recipe

_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0 halves the side
# Peak bfloat16 products of an A100 and an H100, in FLOP a second, and the share that training reaches of it.
_PEAKS, _SHARE = (312e12, 989e12), 0.4


@dataclass(frozen=True)
class Costs:
    """FLOP of all pairs and of the whole distillation; bytes of state, and of activations of a sample."""

    pairs: float
    distill: float
    state: int
    student_activations: int
    picture_activations: int

    def hours(self, peak: float) -> tuple[float, float]:
        """GPU hours of pairs and distillation at `_SHARE` of a peak."""
        return self.pairs / peak / _SHARE / 3600, self.distill / peak / _SHARE / 3600


@dataclass(frozen=True)
class _Pass:
    """One sample's passes: FLOP, parameters, and bytes that autograd keeps."""

    teacher: float
    student: float
    weights: float
    kept: float


def costs(recipe: Recipe) -> Costs:
    """The costs of a recipe of classes."""
    tokenizer, vgg = new_tokenizer(recipe.tokenizer_model).requires_grad_(False), _vgg().requires_grad_(False)
    one, two = (_passes(recipe.model.with_layers(layers), tokenizer) for layers in (1, 2))
    more = recipe.model.num_layers - 1
    whole = _Pass(*(getattr(one, f.name) + more * (getattr(two, f.name) - getattr(one, f.name))
                    for f in fields(_Pass)))  # fmt: skip
    layout, dim = recipe.model.layout, recipe.model.code_dim
    codes = torch.zeros(1, layout.num_tokens, dim, requires_grad=True)
    per_picture, picture_kept = _counted(lambda: vgg(tokenizer.to_image(codes)))
    flow = layout.num_tokens * recipe.pairs.evaluations * 4 * recipe.model.codebook_size * dim
    update = recipe.distill.batch * (3 * whole.student + (1 + 2) * per_picture)
    frozen = sum(p.numel() for p in tokenizer.parameters()) + whole.weights  # the teacher has about as many
    return Costs(
        recipe.pairs.count * (2 * whole.teacher + flow),
        recipe.distill.steps * update,
        int(4 * (5 * whole.weights + frozen)),  # weights, gradients, two moments, average
        int(whole.kept),
        picture_kept,
    )


def _passes(cfg: ModelConfig, tokenizer: AnyTokenizer) -> _Pass:
    teacher = new_teacher(cfg, tokenizer).eval().requires_grad_(False)
    student, label = new_student(cfg), ClassCondition(torch.zeros(1, dtype=torch.long))
    tokens = torch.zeros(1, cfg.layout.num_tokens, dtype=torch.long)
    codes = torch.zeros(1, cfg.layout.num_tokens, cfg.code_dim)
    step = torch.zeros(1, dtype=torch.long)
    per_teacher, _ = _counted(lambda: teacher(tokens, label))
    per_student, kept = _counted(lambda: student(codes, label, step)[1])
    return _Pass(per_teacher, per_student, sum(p.numel() for p in student.parameters()), kept)


def _counted(run: Callable[[], Tensor]) -> tuple[float, int]:
    """FLOP of a call, and bytes that autograd keeps of it."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        result = run()
    del result
    return float(counter.get_total_flops()), sum(kept.values())


def _vgg() -> nn.Sequential:
    """The convolutions of VGG16, which LPIPS reads."""
    layers: list[nn.Module] = []
    before = 3
    for width in _VGG16:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        before = width or before
    return nn.Sequential(*layers)


def main() -> None:
    """Prints the table."""
    head = ("recipe", "pairs, EFLOP", "distillation, EFLOP", "A100 hours", "H100 hours", "state, GB",
            "a sample's activations, GB: student, picture")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in PUBLISHED:
        found = costs(get_recipe(name))
        hours = [" + ".join(f"{h:,.0f}" if h >= 10 else f"{h:.1f}" for h in found.hours(p)) for p in _PEAKS]
        kept = f"{found.student_activations / 1e9:.2f}, {found.picture_activations / 1e9:.2f}"
        cells = (f"`{name}`", f"{found.pairs / 1e18:.1f}", f"{found.distill / 1e18:,.0f}", *hours,
                 f"{found.state / 1e9:.1f}", kept)  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
