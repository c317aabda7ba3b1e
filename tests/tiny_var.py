"""A bundle of the VAR family with random weights: four scales, 30 tokens, 8×8 pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dd_core import plan
from dd_core.bundle import save_bundle
from dd_core.flow import FlowSettings
from dd_core.logits import LogitSettings
from dd_core.manifest import Manifest, PresetEntry
from dd_core.models.config import MultiScaleConfig, VARConfig
from dd_core.models.multiscale_vq import MultiScaleVQ
from dd_core.models.var import VARStudent, VARTeacher
from tests.conformance.recording import redraw

SIDES = (1, 2, 3, 4)
T, L = len(SIDES), sum(p * p for p in SIDES)
VQ = MultiScaleConfig(32, 8, 32, (1, 1), 1, SIDES)
VAR = VARConfig(2, 32, 2, 32, 8, SIDES, 10)


def tiny_var_manifest(student: VARConfig = VAR, **changes: object) -> Manifest:
    """Plans of 1, 2, 3 and 4 passes; students' tails stay continuous, as published, and so show rounding."""
    plans = [plan.one_step(T, split=2), plan.few_steps(T, 2, split=3)]
    plans += [plan.hybrid(T, 1, 2, split=3), plan.hybrid(T, 0, 2, split=3)]
    plans += [plan.teacher(T), plan.trajectory(T)]
    fields = {
        "name": "tiny-var",
        "family": "var",
        "description": "Random weights for tests.",
        "image_size": 8,
        "classes": [f"class {i}" for i in range(VAR.num_classes)],
        "vq": VQ,
        "student": student,
        "teacher": VAR,
        "draw": LogitSettings(2.0, "linear", top_k=20, top_p=0.95),
        "flow": FlowSettings(),
        "presets": [PresetEntry.of(p) for p in plans],
        "data": "none",
        "licence": "MIT",
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_var_models(cfg: VARConfig = VAR) -> tuple[MultiScaleVQ, VARStudent, VARTeacher]:
    """Tokenizer, student of `cfg` and teacher, with weights that depend on nothing else."""
    tokenizer = MultiScaleVQ(VQ)
    student = VARStudent(cfg)
    teacher = VARTeacher(replace(cfg, student_mask="released"), tokenizer.next_inputs)
    for seed, model in enumerate((tokenizer, student, teacher)):
        redraw(model, seed)
        model.eval().requires_grad_(False)
    return tokenizer, student, teacher


def tiny_var_bundle(folder: Path) -> Path:
    """Writes the bundle into `folder` and returns it."""
    tokenizer, student, teacher = tiny_var_models()
    save_bundle(
        folder, tiny_var_manifest(), tokenizer=tokenizer, student=student, teacher=teacher,
        marginals_KLV=None, dtype=torch.float32,
    )  # fmt: skip
    return folder
