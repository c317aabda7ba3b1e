"""How far prepared models are from the recorded tensors in each arithmetic: a table, and bounds for it.

    a fixture's reference weights ─▶ ours ─ prepare(arithmetic) ─▶ the same quantities ─▶ deviations by kind

`exact32` has to agree as the reference models do. What bfloat16 and float16 round is no fault, as long as it
is no more than their number of digits explains.

Shapes: B batch, L tokens, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dd_core.condition import ClassCondition
from dd_core.engine.arithmetic import Arithmetic
from dd_core.engine.prepared import prepare_student, prepare_teacher, prepare_tokenizer
from tests.conformance import llamagen, var
from tests.conformance.report import Fixture, Report, read_manifest

# Endings of quantities, and what they are.
_KINDS = {".tokens": "embedding head", ".logits": "logits head", ".img": "image"}
# The largest deviation of a head (root mean square, of the recorded tensor's) that rounding explains. Of an
# image there is none: a near tie between two codes changes a patch.
BOUNDS = {"exact32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}


class Deviation(NamedTuple):
    """Of one kind of quantity in one fixture: differences' root mean square ÷ the recorded tensors', the
    largest difference, and the share of rows whose largest logit is the same (None of other kinds).
    """

    fixture: str
    kind: str
    relative: float
    largest: float
    same: float | None

    def explained(self, arithmetic: Arithmetic) -> bool:
        """True if it is no more than the arithmetic rounds."""
        return self.kind == "image" or self.relative <= BOUNDS[arithmetic.name]


@dataclass
class Measured(Fixture):
    """A fixture whose models are prepared, and whose comparisons are kept instead of judged."""

    arithmetic: Arithmetic | None = None
    found: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def ready(self, model: nn.Module) -> Any:
        assert self.arithmetic is not None
        prepared = prepare_tokenizer(model, self.arithmetic)  # type: ignore[arg-type]
        return prepare_student(model, self.arithmetic) if prepared is model else prepared  # type: ignore[arg-type]

    def compare(self, name: str, ours: Tensor, **_: float) -> None:
        kind = next((kind for ending, kind in _KINDS.items() if name.endswith(ending)), None)
        if kind is not None:
            self.note(kind, ours, self.io[f"out.{name}"])

    def note(self, kind: str, ours: Tensor, theirs: Tensor) -> None:
        """Keep one comparison."""
        assert ours.shape == theirs.shape
        self.found.setdefault(kind, []).append((ours.double(), theirs.double()))

    def deviations(self) -> list[Deviation]:
        """A row for each kind."""
        return [_deviation(self.name, kind, pairs) for kind, pairs in self.found.items()]


def _deviation(fixture: str, kind: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Deviation:
    error = torch.cat([(ours - theirs).flatten() for ours, theirs in pairs])
    size = torch.cat([theirs.flatten() for _, theirs in pairs])
    same = [(ours.argmax(-1) == theirs.argmax(-1)).flatten() for ours, theirs in pairs]
    return Deviation(
        fixture,
        kind,
        math.sqrt(error.square().mean().item() / size.square().mean().item()),
        error.abs().max().item(),
        torch.cat(same).double().mean().item() if "logits" in kind else None,
    )


def _var_teacher(fixture: Measured) -> None:
    """Scale by scale, on the tokens that the reference took."""
    assert fixture.arithmetic is not None
    tokenizer = var.tokenizer_of(fixture)
    reference = var.teacher_of(fixture, fixture.config["model"], fixture.name, tokenizer)
    pictures = prepare_tokenizer(tokenizer, fixture.arithmetic)
    model = prepare_teacher(reference, pictures, fixture.arithmetic)
    labels = ClassCondition(fixture.inputs("labels"))
    tokens, doubled = var.indices(fixture, "out.ar_greedy.idx"), labels.joined(reference.null_like(labels))
    cache = model.new_cache(len(doubled))
    for k in range(reference.layout.num_blocks):
        logits = model.block_logits(torch.cat([tokens, tokens]), doubled, k, cache)
        fixture.note("teacher's logits", logits, fixture.io[f"out.ar_greedy.logits_raw.s{k}"])


def _llamagen_teacher(fixture: Measured) -> None:
    """Token by token, on the tokens that the reference was given."""
    assert fixture.arithmetic is not None
    tokenizer = llamagen.tokenizer_of(fixture)
    reference = llamagen.teacher_of(fixture, fixture.config["model"], "lg_gpt_c2i", tokenizer.cfg)
    model = prepare_teacher(reference, prepare_tokenizer(tokenizer, fixture.arithmetic), fixture.arithmetic)
    tokens, labels = fixture.inputs("idx"), ClassCondition(fixture.inputs("labels"))
    cache = model.new_cache(len(tokens))
    steps = [model.block_logits(tokens, labels, k, cache) for k in range(reference.layout.num_blocks)]
    fixture.note("teacher's logits", torch.cat(steps, 1), fixture.io["out.cached_logits"])


CHECKS = {
    "var_dd": var.check_dd,
    "var_teacher": _var_teacher,
    "lg_dd": llamagen.check_dd,
    "lg_gpt_c2i": _llamagen_teacher,
}


@torch.inference_mode()
def measure(folder: Path, arithmetic: Arithmetic) -> list[Deviation]:
    """The deviations of an arithmetic, fixture by fixture.

    Raises:
        ValueError: the folder has no manifest of fixtures.
    """
    rows = []
    for name, facts in read_manifest(folder)["fixtures"].items():
        if name in CHECKS:
            fixture = Measured(name, folder, facts, Report(), arithmetic=arithmetic)
            CHECKS[name](fixture)  # type: ignore[operator]
            rows += fixture.deviations()
    return rows


def table(rows: Sequence[Deviation], arithmetic: Arithmetic) -> str:
    """The rows as a table of Markdown."""
    lines = [f"| fixture | quantity | {arithmetic.name}: rms ÷ rms | largest | same choice |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        same = "–" if row.same is None else f"{100 * row.same:.1f} %"
        lines.append(f"| {row.fixture} | {row.kind} | {row.relative:.1e} | {row.largest:.1e} | {same} |")
    return "\n".join(lines)
