"""A sampler made ready for inference: modules that are derived from the reference models, never the reverse.

    reference models (trained, checked in float64) ─ prepare ─▶ the same functions, folded, in an arithmetic

What a prepared model holds unchanged it shares with the reference; dropping the reference frees the rest (the
tokenizer's encoder, and all that was folded or cast).
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from dd_core.engine.arithmetic import Arithmetic
from dd_core.engine.decoder import PreparedScales, PreparedVQ
from dd_core.engine.llamagen import prepare_llamagen
from dd_core.engine.var import FoldedStudent, FoldedTeacher
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.protocols import BlockByBlock, Jump, Pictures
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.models.vq import VQTokenizer
from dd_core.sampling import Sampler

_PRODUCT = re.compile(
    r"(blocks|layers)\.\d+\.(attn|ffn|attention|feed_forward)\.\w+\.weight|(.+\.|shared_)ada_lin\.1\.weight"
)


def prepare(sampler: Sampler, arithmetic: Arithmetic) -> Sampler:
    """The sampler on prepared models. One that is prepared already comes back as it is."""
    for part in ("tokenizer", "student", "teacher"):
        sampler = prepare_part(sampler, part, arithmetic)
    return sampler


def prepare_part(sampler: Sampler, part: str, arithmetic: Arithmetic, *, spent: bool = False) -> Sampler:
    """The sampler with one of its models prepared, if it has it; the tokenizer goes before the teacher.

    Args:
        spent: nobody uses the reference model any more: what is folded of it is freed on the way, so that the
            two are never whole at the same time.
    """
    match part:
        case "tokenizer":
            return replace(sampler, tokenizer=prepare_tokenizer(sampler.tokenizer, arithmetic))
        case "student" if sampler.student is not None:
            return replace(sampler, student=prepare_student(sampler.student, arithmetic, spent=spent))
        case "teacher" if sampler.teacher is not None:
            teacher = prepare_teacher(sampler.teacher, sampler.tokenizer, arithmetic, spent=spent)
            return replace(sampler, teacher=teacher)
    return sampler


def stored_type(name: str, arithmetic: Arithmetic) -> torch.dtype:
    """The type that a weight can have from the start, by its name in a checkpoint: products are cast as they
    are, of other weights things are computed first.
    """
    return arithmetic.weights if _PRODUCT.fullmatch(name) else torch.float32


def prepare_tokenizer(tokenizer: Pictures, arithmetic: Arithmetic) -> Pictures:
    """The tokenizer without its encoder."""
    match tokenizer:
        case VQTokenizer():
            return PreparedVQ(tokenizer, arithmetic)
        case MultiScaleVQ():
            return PreparedScales(tokenizer, arithmetic)
    return tokenizer


def prepare_student(student: Jump, arithmetic: Arithmetic, *, spent: bool = False) -> Jump:
    """The student for `predict` alone; `spent` as in `prepare_part`."""
    match student:
        case LlamaGenStudent():
            return prepare_llamagen(student, arithmetic)
        case VARStudent():
            return FoldedStudent(student, arithmetic, spent=spent)
    return student


def prepare_teacher(
    teacher: BlockByBlock, tokenizer: Pictures, arithmetic: Arithmetic, *, spent: bool = False
) -> BlockByBlock:
    """The teacher for block after block.

    Args:
        tokenizer: prepared; VAR's teacher reads its f̂.
        spent: as in `prepare_part`.
    """
    match teacher:
        case LlamaGenTeacher():
            return prepare_llamagen(teacher, arithmetic)
        case VARTeacher() if isinstance(tokenizer, PreparedScales):
            return FoldedTeacher(teacher, tokenizer.next_inputs, arithmetic, spent=spent)
    return teacher
