"""A bundle with random weights and the real code: small enough to load in a test."""

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

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def tiny_manifest(fids: dict[str, float] | None = None) -> Manifest:
    """8×8 tokens, 10 classes, 32×32 pixels; plans of 1, 2, 12, 21 and 64 passes."""
    fids = fids or {
        "dd-1": 50.0,
        "dd-2": 40.0,
        "pre-trained-11-21": 35.0,
        "pre-trained-1-21": 32.0,
        "teacher": 30.0,
    }
    plans = [
        plan.one_step(64),
        plan.few_steps(64, 20),
        plan.hybrid(64, 10, 20),
        plan.hybrid(64, 0, 20),
        plan.teacher(64),
    ]
    baselines = [plan.trajectory(64), plan.skip(64, 24), plan.onestep(64)]
    presets = [PresetEntry.of(p, metrics={"fid": fids[p.name]}) for p in plans]
    presets += [PresetEntry.of(p, offered=False) for p in baselines]
    cfg = LlamaGenConfig(layers=2, heads=2, dim=32, codebook_size=64, code_dim=4, grid=8, num_classes=10)
    return Manifest(
        name="tiny",
        family="llamagen",
        description="Random weights for tests.",
        image_size=32,
        classes=CLASSES,
        vq=VQConfig(64, 4, 32, 32, (1, 1, 1), 1),
        student=cfg,
        teacher=cfg,
        draw=LogitSettings(guidance=2.0, top_k=32),
        flow=FlowSettings(),
        presets=presets,
        data="none",
        licence="MIT",
    )


def tiny_bundle(folder: Path, seed: int = 0) -> Path:
    """Writes the bundle into `folder` and returns it."""
    manifest = tiny_manifest()
    assert manifest.teacher is not None
    torch.manual_seed(seed)
    marginals = torch.randn(10, 64, 64).log_softmax(-1)
    tokenizer = VQTokenizer(manifest.vq)
    student, teacher = LlamaGenStudent(manifest.student), LlamaGenTeacher(manifest.teacher)
    for model in (student, teacher):
        # Freshly initialised logits are all but equal; sharper ones make choices robust.
        model.output.weight.data.mul_(20)
        model.cls_embedding.embedding_table.weight.data.mul_(20)
    models = {"tokenizer": tokenizer, "student": student, "teacher": teacher}
    save_bundle(folder, manifest, **models, marginals_KLV=marginals)  # type: ignore[arg-type]
    return folder
