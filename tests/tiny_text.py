"""A text-conditional bundle with random weights and a small encoder: plans of 1, 2, 21 and 64 passes."""

from __future__ import annotations

from pathlib import Path

import torch

from dd_core import plan
from dd_core.bundle import save_bundle
from dd_core.flow import FlowSettings
from dd_core.logits import LogitSettings
from dd_core.manifest import Manifest, PresetEntry
from dd_core.models.config import LlamaGenConfig, VQConfig
from dd_core.models.llamagen import LlamaGenStudent, LlamaGenTeacher
from dd_core.models.vq import VQTokenizer
from tests.dd_core.small_text import TEXT, small_text

EXAMPLES = ["a red cat", "blue hearts"]


def tiny_text_manifest(**changes: object) -> Manifest:
    """8×8 tokens, 32×32 pixels, prompts of up to eight positions."""
    plans = {
        plan.one_step(64): 50.0,
        plan.few_steps(64, 20): 40.0,
        plan.hybrid(64, 0, 20, draw="flow"): 32.0,
        plan.teacher(64, draw="flow"): 30.0,
    }
    cfg = LlamaGenConfig(
        layers=2, heads=2, dim=32, codebook_size=64, code_dim=4, grid=8, num_classes=1,
        text_tokens=TEXT.length, text_dim=TEXT.dim,
    )  # fmt: skip
    fields = {
        "name": "tiny-text",
        "family": "llamagen",
        "description": "Random weights for tests.",
        "image_size": 32,
        "examples": EXAMPLES,
        "vq": VQConfig(64, 4, 32, 32, (1, 1, 1), 1),
        "student": cfg,
        "teacher": cfg,
        "text": TEXT,
        "draw": LogitSettings(guidance=2.0),
        "flow": FlowSettings(),
        "presets": [PresetEntry.of(p, metrics={"fid": fid}) for p, fid in plans.items()],
        "data": "none",
        "licence": "MIT",
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_text_bundle(folder: Path, **changes: object) -> Path:
    """Writes the bundle into `folder` and returns it."""
    manifest = tiny_text_manifest(**changes)
    torch.manual_seed(0)
    tokenizer = VQTokenizer(manifest.vq)  # type: ignore[arg-type]
    student, teacher = LlamaGenStudent(manifest.student), LlamaGenTeacher(manifest.teacher)  # type: ignore[arg-type]
    for model in (student, teacher):
        # Freshly initialised logits are all but equal; sharper ones make choices robust.
        model.output.weight.data.mul_(20)
        for layer in (model.cls_embedding.cap_proj.fc1, model.cls_embedding.cap_proj.fc2):
            layer.weight.data.mul_(20)
    text, pieces = small_text()
    save_bundle(
        folder, manifest, tokenizer=tokenizer, student=student, teacher=teacher, marginals_KLV=None,
        text=text, pieces=pieces,
    )  # fmt: skip
    return folder
