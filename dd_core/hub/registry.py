"""The published models by name.

File names and the places of the weights inside them are those of the authors' READMEs and loading
code; no revision is known to us, so all are `main`. FIDs are those of Tables 1 to 3 of the paper,
for teachers too: a model's own authors may report others, measured with other tools. Splits and
times of the steps are those of the released scripts.

A plan counts blocks: VAR's scales, LlamaGen's tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from dd_core import plan
from dd_core.errors import BundleNotFoundError
from dd_core.hub.spec import ModelSpec, RemoteFile
from dd_core.logits import LogitSettings
from dd_core.manifest import PresetEntry
from dd_core.models.config import LlamaGenConfig, MultiScaleConfig, VARConfig, VQConfig
from dd_core.plan import Plan

_DD = "microsoft/distilled_decoding"
_VAR = "FoundationVision/var"
_LLAMAGEN = "FoundationVision/LlamaGen"
_LLAMAGEN_T2I = "peizesun/llamagen_t2i"

# Where the loading code of each family looks inside its files.
_MODEL = (("model",), ("module",), ("state_dict",), ())
_PLAIN = ((), ("state_dict",), ("model",), ("trainer", "var_wo_ddp"))  # the last: of VAR's training script
_VAR_EMA = (("trainer", "ema_parameters"), ("trainer", "var_wo_ddp"), ())
_LLAMAGEN_EMA = (("ema",), ("model",), ())

_VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

_IMAGENET = "ImageNet-1k, by the model's authors. The bundle holds weights, none of the images."
_TERMS = " These are the terms of the repositories as we know them; the hub's pages decide."
_VAR_LICENCE = "VAR: MIT (FoundationVision)."
_LLAMAGEN_LICENCE = "LlamaGen: mostly MIT, parts under the terms of what they were derived from."
_DD_LICENCE = "DD students: MIT (microsoft/distilled_decoding)."

_VAR_DRAW = LogitSettings(guidance=1.5, guidance_schedule="linear", top_k=900, top_p=0.96)
_VAR_DD_DRAW = LogitSettings(guidance=2.0, guidance_schedule="linear", top_k=900, top_p=0.95)
_LLAMAGEN_DD_DRAW = LogitSettings(guidance=2.0, top_k=8000)
_T2I_DRAW = LogitSettings(guidance=7.5, top_k=1000)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1,000 classes, each the words of a WordNet synset, in the order of the models'
    indices. "crane" and "maillot" each stand for two classes, as in the data set itself.
    """
    return tuple((Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


def _published(what: Plan, fid: float | None) -> PresetEntry:
    return PresetEntry.of(what, published=fid is not None, metrics={} if fid is None else {"fid": fid})


def _distilled(
    base: ModelSpec,
    name: str,
    model: str,
    file: RemoteFile,
    draw: LogitSettings,
    plans: Sequence[tuple[Plan, float]],
) -> ModelSpec:
    """The student of a teacher, with it: `plans` and their FIDs come before the teacher's own."""
    return replace(
        base,
        name=name,
        description=f"Distilled Decoding of {model} on ImageNet at 256×256, with teacher.",
        files={"tokenizer": base.files["tokenizer"], "student": file, "teacher": base.files["teacher"]},
        student=base.teacher,
        draw=draw,
        presets=(*(_published(*p) for p in plans), *base.presets),
        licence=f"{_DD_LICENCE} {base.licence}",
    )


# VAR: depth → FID of the teacher, of one step and of two.
_VAR_FID = {16: (4.19, 9.94, 7.82), 20: (3.35, 9.55, 7.33), 24: (2.51, 8.92, 6.95)}
# Depth → the second step's first scale, which is also the first scale of the embedding head.
_VAR_SECOND = {16: 5, 20: 4, 24: 4}
_VAR_HYBRIDS = (
    (plan.hybrid(10, 4, 5, 5), 6.54),
    (plan.hybrid(10, 3, 5, 8), 5.47),
    (plan.hybrid(10, 0, 5, 9), 5.03),
)


def _var_teacher(depth: int) -> ModelSpec:
    size, cfg, vq = 256, VARConfig.of_depth(depth), MultiScaleConfig()
    if depth == 36:
        size, cfg, vq = 512, replace(cfg, sides=_VAR_512, shared_adaln=True), replace(vq, sides=_VAR_512)
    fid = _VAR_FID[depth][0] if depth in _VAR_FID else None
    return ModelSpec(
        name=f"var-d{depth}",
        family="var",
        description=f"VAR-d{depth}, next-scale prediction on ImageNet at {size}×{size}: the teacher alone.",
        image_size=size,
        classes=imagenet_classes(),
        files={
            "tokenizer": RemoteFile(_VAR, "vae_ch160v4096z32.pth", _PLAIN),
            "teacher": RemoteFile(_VAR, f"var_d{depth}.pth", _PLAIN),
        },
        vq=vq,
        teacher=cfg,
        draw=_VAR_DRAW,
        presets=(_published(plan.teacher(len(cfg.sides)), fid),),
        data=_IMAGENET,
        licence=_VAR_LICENCE + _TERMS,
    )


def _var_dd(depth: int) -> ModelSpec:
    _, one, two = _VAR_FID[depth]
    second = _VAR_SECOND[depth]
    plans = [(plan.one_step(10, second), one), (plan.few_steps(10, second, split=second), two)]
    plans += _VAR_HYBRIDS if depth == 16 else ()
    file = RemoteFile(_DD, f"VAR-DD/var-d{depth}.pth", _VAR_EMA)
    return _distilled(_var_teacher(depth), f"var-dd-d{depth}", f"VAR-d{depth}", file, _VAR_DD_DRAW, plans)


# Size → layers, heads, width, and the guidance of the authors' own FID.
_GPT = {
    "b": (12, 12, 768, 2.0),
    "l": (24, 16, 1024, 2.0),
    "xl": (36, 20, 1280, 1.75),
    "xxl": (48, 24, 1536, 1.75),
    "3b": (24, 32, 3200, 1.65),
}
# Size → FID of the 256-pixel teacher, of one step and of two.
_LLAMAGEN_FID = {"b": (5.42, 15.50, 11.17), "l": (4.11, 11.35, 7.58)}
# Size → first token that comes from the embedding head.
_LLAMAGEN_SPLIT = {"b": 80, "l": 130}
_LLAMAGEN_HYBRIDS = (
    (plan.hybrid(256, 60, 80, 180), 6.76),
    (plan.hybrid(256, 40, 80, 180), 6.20),
    (plan.hybrid(256, 0, 80, 220), 5.71),
)


def _gpt(size: str, pixels: int, **text: int) -> LlamaGenConfig:
    layers, heads, dim, _ = _GPT[size]
    return LlamaGenConfig(layers=layers, heads=heads, dim=dim, grid=pixels // 16, **text)


def _llamagen_teacher(size: str, pixels: int) -> ModelSpec:
    cfg = _gpt(size, pixels)
    fid = _LLAMAGEN_FID[size][0] if size in _LLAMAGEN_FID and pixels == 256 else None
    return ModelSpec(
        name=f"llamagen-{size}-{pixels}",
        family="llamagen",
        description=f"LlamaGen-{size.upper()}, next-token prediction on ImageNet at {pixels}×{pixels}: "
        "the teacher alone.",
        image_size=pixels,
        classes=imagenet_classes(),
        files={
            "tokenizer": RemoteFile(_LLAMAGEN, "vq_ds16_c2i.pt", _MODEL),
            "teacher": RemoteFile(_LLAMAGEN, f"c2i_{size.upper()}_{pixels}.pt", _MODEL),
        },
        vq=VQConfig(),
        teacher=cfg,
        draw=LogitSettings(guidance=_GPT[size][3]),
        presets=(_published(plan.teacher(cfg.layout.num_blocks), fid),),
        data=_IMAGENET,
        licence=_LLAMAGEN_LICENCE + _TERMS,
    )


def _llamagen_dd(size: str) -> ModelSpec:
    _, one, two = _LLAMAGEN_FID[size]
    split = _LLAMAGEN_SPLIT[size]
    plans = [(plan.one_step(256, split), one), (plan.few_steps(256, 80, split=split), two)]
    plans += _LLAMAGEN_HYBRIDS if size == "l" else ()
    base, model = _llamagen_teacher(size, 256), f"LlamaGen-{size.upper()}"
    file = RemoteFile(_DD, f"LlamaGen-DD/llamagen-{size.upper()}.pt", _LLAMAGEN_EMA)
    return _distilled(base, f"llamagen-dd-{size}", model, file, _LLAMAGEN_DD_DRAW, plans)


def _llamagen_t2i(pixels: int) -> ModelSpec:
    stage, fid, trained_on = {
        256: (1, 25.70, "LAION-COCO, by the model's authors."),
        512: (2, None, "Data of the model's authors that is not public."),
    }[pixels]
    cfg = _gpt("xl", pixels, text_tokens=120, text_dim=2048)
    return replace(
        _llamagen_teacher("xl", pixels),
        name=f"llamagen-t2i-{pixels}",
        description=f"LlamaGen-XL from text at {pixels}×{pixels}, stage {stage}: the teacher alone.",
        classes=(),
        files={
            "tokenizer": RemoteFile(_LLAMAGEN_T2I, "vq_ds16_t2i.pt", _MODEL),
            "teacher": RemoteFile(_LLAMAGEN_T2I, f"t2i_XL_stage{stage}_{pixels}.pt", _MODEL),
        },
        teacher=cfg,
        draw=_T2I_DRAW,
        presets=(_published(plan.teacher(cfg.layout.num_blocks), fid),),
        data=trained_on,
    )


@cache
def registry() -> dict[str, ModelSpec]:
    """Every published model by name: students first, then teachers, then text."""
    specs = [
        *(_var_dd(depth) for depth in (16, 20, 24)),
        *(_llamagen_dd(size) for size in ("b", "l")),
        *(_var_teacher(depth) for depth in (16, 20, 24, 30, 36)),
        *(_llamagen_teacher(size, pixels) for size in ("b", "l") for pixels in (256, 384)),
        *(_llamagen_teacher(size, 384) for size in ("xl", "xxl", "3b")),
        *(_llamagen_t2i(pixels) for pixels in (256, 512)),
    ]
    return {spec.name: spec for spec in specs}


def find_spec(name: str) -> ModelSpec:
    """The published model of a name.

    Raises:
        BundleNotFoundError: no such name; the message has near ones and all of them.
    """
    known = registry()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise BundleNotFoundError(
        f"no published model {name!r}{hint}; known are {', '.join(known)}", param="model"
    )
