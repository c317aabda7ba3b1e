"""The tiny bundle of VAR's family with a text as its condition, and a small encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dd_core.bundle import save_bundle
from tests.dd_core.small_text import TEXT, small_text
from tests.tiny_text import EXAMPLES
from tests.tiny_var import VAR, tiny_var_manifest, tiny_var_models

VAR_TEXT = replace(VAR, num_classes=1, text_tokens=TEXT.length, text_dim=TEXT.dim)


def tiny_var_text_bundle(folder: Path) -> Path:
    """Writes the bundle into `folder` and returns it."""
    tokenizer, student, teacher = tiny_var_models(VAR_TEXT)
    manifest = tiny_var_manifest(
        VAR_TEXT, name="tiny-var-text", classes=[], examples=EXAMPLES, text=TEXT, teacher=VAR_TEXT
    )
    text, pieces = small_text()
    save_bundle(
        folder, manifest, tokenizer=tokenizer, student=student, teacher=teacher, marginals_KLV=None,
        dtype=torch.float32, text=text, pieces=pieces,
    )  # fmt: skip
    return folder
