"""A sampler made ready for inference: modules that are derived from the reference models, never the reverse.

    reference models (trained, checked in float64) ─ prepare ─▶ the same functions, folded, in an arithmetic

What a prepared model holds unchanged it shares with the reference; dropping the reference frees the rest (the
tokenizer's encoder, and all that was folded or cast).
"""

from __future__ import annotations

from dataclasses import replace

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


def prepare(sampler: Sampler, arithmetic: Arithmetic) -> Sampler:
    """The sampler on prepared models. One that is prepared already comes back as it is."""
    tokenizer = prepare_tokenizer(sampler.tokenizer, arithmetic)
    student = None if sampler.student is None else prepare_student(sampler.student, arithmetic)
    teacher = None if sampler.teacher is None else prepare_teacher(sampler.teacher, tokenizer, arithmetic)
    return replace(sampler, tokenizer=tokenizer, student=student, teacher=teacher)


def prepare_tokenizer(tokenizer: Pictures, arithmetic: Arithmetic) -> Pictures:
    """The tokenizer without its encoder."""
    match tokenizer:
        case VQTokenizer():
            return PreparedVQ(tokenizer, arithmetic)
        case MultiScaleVQ():
            return PreparedScales(tokenizer, arithmetic)
    return tokenizer


def prepare_student(student: Jump, arithmetic: Arithmetic) -> Jump:
    """The student for `predict` alone."""
    match student:
        case LlamaGenStudent():
            return prepare_llamagen(student, arithmetic)
        case VARStudent():
            return FoldedStudent(student, arithmetic)
    return student


def prepare_teacher(teacher: BlockByBlock, tokenizer: Pictures, arithmetic: Arithmetic) -> BlockByBlock:
    """The teacher for block after block.

    Args:
        tokenizer: prepared; VAR's teacher reads its f̂.
    """
    match teacher:
        case LlamaGenTeacher():
            return prepare_llamagen(teacher, arithmetic)
        case VARTeacher() if isinstance(tokenizer, PreparedScales):
            return FoldedTeacher(teacher, tokenizer.next_inputs, arithmetic)
    return teacher
