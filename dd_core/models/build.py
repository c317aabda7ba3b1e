"""Architecture → module, by the type of its config: the one place that builds modules of every family."""

from __future__ import annotations

import torch
from torch import nn

from dd_core.errors import WeightsError
from dd_core.models.config import (
    LlamaGenConfig,
    ModelConfig,
    MultiScaleConfig,
    TokenizerConfig,
    VARConfig,
    VQConfig,
)
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from dd_core.models.vq import VQTokenizer

AnyTokenizer = VQTokenizer | MultiScaleVQ
AnyStudent = LlamaGenStudent | VARStudent
AnyTeacher = LlamaGenTeacher | VARTeacher


def new_tokenizer(cfg: TokenizerConfig) -> AnyTokenizer:
    """The tokenizer of an architecture, freshly initialised."""
    match cfg:
        case VQConfig():
            return VQTokenizer(cfg)
        case MultiScaleConfig():
            return MultiScaleVQ(cfg)


def new_student(cfg: ModelConfig) -> AnyStudent:
    """The student of an architecture, freshly initialised."""
    match cfg:
        case LlamaGenConfig():
            return LlamaGenStudent(cfg)
        case VARConfig():
            return VARStudent(cfg)


def new_teacher(cfg: ModelConfig, tokenizer: AnyTokenizer) -> AnyTeacher:
    """The teacher of a tokenizer's tokens.

    Raises:
        WeightsError: a VAR teacher on a tokenizer that has no scales.
    """
    match cfg:
        case LlamaGenConfig():
            return LlamaGenTeacher(cfg)
        case VARConfig():
            if not isinstance(tokenizer, MultiScaleVQ):
                raise WeightsError("a VAR teacher needs a multi-scale tokenizer", param="teacher")
            return VARTeacher(cfg, tokenizer.next_inputs)


def new_models(
    vq: TokenizerConfig, student: ModelConfig | None, teacher: ModelConfig | None
) -> tuple[AnyTokenizer, AnyStudent | None, AnyTeacher | None]:
    """Tokenizer, student and teacher; raises as `new_teacher`."""
    tokenizer = new_tokenizer(vq)
    return (
        tokenizer,
        None if student is None else new_student(student),
        None if teacher is None else new_teacher(teacher, tokenizer),
    )


def on_meta() -> torch.device:
    """A context in which modules are built without memory or initialisation.

    Weights then come by `load_state_dict(assign=True)`, and what a module computes itself by
    `restore`.
    """
    return torch.device("meta")


def restore(module: nn.Module) -> None:
    """Recomputes the buffers that a module derives from its config, after a build on the meta device."""
    for part in module.modules():
        derive = getattr(part, "derive", None)
        if derive is not None:
            derive()
