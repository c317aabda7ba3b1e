"""Figures of the paper: Tables 1, 2 and 3 of "Distilled Decoding 1: One-step Sampling of Image
Auto-regressive Models with Flow Matching" (arXiv 2412.17153).

Classes: ImageNet at 256×256, 50,000 images against ADM's reference. Texts: 5,000 prompts of LAION-COCO.
Times are seconds an image on one A100, in the steady state.
"""

from __future__ import annotations

from dataclasses import dataclass

from dd_core.models.config import ModelConfig

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Figures:
    """A row of a table: None where the paper has a dash."""

    table: int
    fid: float | None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    seconds: float | None = None


_VAR_D16 = {
    "teacher": Figures(1, 4.19, 230.2, 0.84, 0.48, 0.133),
    "skip-1": Figures(1, 9.52, 178.9, 0.68, 0.54, 0.113),
    "skip-2": Figures(1, 40.09, 56.8, 0.46, 0.50, 0.098),
    "onestep": Figures(1, 157.5),
    "dd-1": Figures(1, 9.94, 193.6, 0.80, 0.37, 0.021),
    "dd-2": Figures(1, 7.82, 197.0, 0.80, 0.41, 0.036),
    "pre-trained-1-6": Figures(2, 5.03, 242.8, 0.84, 0.45, 0.090),
    "pre-trained-4-6": Figures(2, 5.47, 230.5, 0.84, 0.43, 0.062),
    "pre-trained-5-6": Figures(2, 6.54, 210.8, 0.83, 0.42, 0.045),
}
_VAR_D20 = {
    "teacher": Figures(1, 3.35, 301.4, 0.84, 0.51),
    "dd-1": Figures(1, 9.55, 197.2, 0.78, 0.38),
    "dd-2": Figures(1, 7.33, 204.5, 0.82, 0.40),
}
_VAR_D24 = {
    "teacher": Figures(1, 2.51, 312.2, 0.82, 0.53),
    "dd-1": Figures(1, 8.92, 202.8, 0.78, 0.39),
    "dd-2": Figures(1, 6.95, 222.5, 0.83, 0.43),
}
_LLAMAGEN_B = {
    "teacher": Figures(1, 5.42, 193.5, 0.83, 0.44),
    "dd-1": Figures(1, 15.50, 135.4, 0.76, 0.26),
    "dd-2": Figures(1, 11.17, 154.8, 0.80, 0.31),
}
_LLAMAGEN_L = {
    "teacher": Figures(1, 4.11, 283.5, 0.85, 0.48, 5.01),
    "skip-106": Figures(1, 19.14, 80.39, 0.42, 0.43, 2.94),
    "skip-156": Figures(1, 80.72, 12.13, 0.17, 0.20, 1.95),
    "onestep": Figures(1, 220.2),
    "dd-1": Figures(1, 11.35, 193.6, 0.81, 0.30, 0.023),
    "dd-2": Figures(1, 7.58, 237.5, 0.84, 0.37, 0.043),
    "pre-trained-1-81": Figures(2, 5.71, 238.6, 0.83, 0.43, 1.725),
    "pre-trained-41-81": Figures(2, 6.20, 233.8, 0.83, 0.41, 0.880),
    "pre-trained-61-81": Figures(2, 6.76, 231.4, 0.83, 0.40, 0.447),
}
_LLAMAGEN_TEXT = {
    "teacher": Figures(3, 25.70, seconds=7.90),
    "dd-1": Figures(3, 36.09, seconds=0.052),
    "dd-2": Figures(3, 28.95, seconds=0.085),
}

# Family, blocks of the network, its width, tokens of an image, condition.
_MODELS = {
    ("var", 16, 1024, 680, "classes"): _VAR_D16,
    ("var", 20, 1280, 680, "classes"): _VAR_D20,
    ("var", 24, 1536, 680, "classes"): _VAR_D24,
    ("llamagen", 12, 768, 256, "classes"): _LLAMAGEN_B,
    ("llamagen", 24, 1024, 256, "classes"): _LLAMAGEN_L,
    ("llamagen", 36, 1280, 256, "texts"): _LLAMAGEN_TEXT,
}


def paper_figures(model: ModelConfig) -> dict[str, Figures]:
    """The paper's figures of a model of this architecture, by the names of our plans; none of another."""
    condition = "texts" if model.text_dim else "classes"
    if not model.text_dim and model.num_classes != IMAGENET_CLASSES:
        return {}
    key = (model.family, model.num_layers, model.dim, model.layout.num_tokens, condition)
    return _MODELS.get(key, {})
