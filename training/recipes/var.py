"""Recipes of VAR's family: next-scale order, of classes and of texts."""

from __future__ import annotations

import dataclasses

from dd_core.models.config import MultiScaleConfig, VARConfig
from dd_core.text.config import MiniLMConfig
from training.recipes.llamagen import LLAMAGEN
from training.recipes.settings import (
    DecoderRecipe,
    DistillRecipe,
    EvaluateRecipe,
    PairsRecipe,
    Recipe,
    TeacherRecipe,
    TokenizerRecipe,
)

_TINY, _CPU, _GPU = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 8)

VAR: dict[str, Recipe] = {
    "var-tiny": dataclasses.replace(
        LLAMAGEN["tiny"],
        name="var-tiny",
        tokenizer_model=MultiScaleConfig(64, 4, 32, (1, 1, 1), 1, _TINY),
        model=VARConfig(depth=2, dim=32, heads=2, codebook_size=64, code_dim=4, sides=_TINY, num_classes=10),
        distill=DistillRecipe(steps=6, batch=8, train_steps=(0, 2), split=2, lpips_share=0.5, mse=1.0),
    ),
    # Of the built-in model: teacher and student with `compile=true`; the tokenizer in two legs of 8,000 and
    # 3,600 steps, of which the second was `enlarged`. Its student had 2,200 steps more, which began with it
    # (`distill.start=student`): `distill.adversarial=0.5`, `distill.enlarged=2`, lr 7e-4, matrix_lr 1.4e-3.
    "var-cpu": Recipe(
        name="var-cpu",
        tokenizer_model=MultiScaleConfig(1024, 16, 32, (1, 2, 4), 1, _CPU),
        model=VARConfig(
            depth=8, dim=192, heads=3, codebook_size=1024, code_dim=16, sides=_CPU, num_classes=10
        ),
        tokenizer=TokenizerRecipe(
            steps=11_600,
            batch=32,
            lpips_share=0.25,
            enlarged=2,
            continuous_for=0.02,
            adversarial=0.2,
            judged_from=0.8,
            judge_lr=1e-3,
            ramp=0.1,
        ),
        decoder=DecoderRecipe(steps=1_000, batch=16, enlarged=2, drawn=1.0),
        teacher=TeacherRecipe(steps=7_600, batch=64, lr=2e-3, matrix_lr=3e-3),
        pairs=PairsRecipe(
            count=80_000,
            batch=250,
            shard=2_500,
            guidance=5.5,
            guidance_schedule="linear",
            solver="dpmpp-2m",
        ),
        distill=DistillRecipe(
            steps=3_000,
            batch=64,
            train_steps=(0, 3),
            optimizer="muon",
            evenness=0.5,
            cross_entropy=1.0,
            mse=1.0,
            lpips=0.0,
            ema=0.998,
        ),
        evaluate=EvaluateRecipe(
            images=2_000,
            reference=4_000,
            test=2_000,
            precision="auto",
            plans=("dd-1", "dd-2", "pre-trained-1-4", "teacher", "skip-2", "onestep"),
        ),
    ),
    # Sized like `gpu`, by arithmetic and not yet run.
    "var-gpu": Recipe(
        name="var-gpu",
        tokenizer_model=MultiScaleConfig(4096, 32, 64, (1, 2, 2), 2, _GPU),
        model=VARConfig(
            depth=12, dim=384, heads=6, codebook_size=4096, code_dim=32, sides=_GPU, num_classes=10
        ),
        tokenizer=TokenizerRecipe(steps=8_000, batch=256),
        decoder=DecoderRecipe(steps=8_000, batch=128, ema=0.999),
        teacher=TeacherRecipe(steps=10_000, batch=512, lr=2e-3, matrix_lr=3e-3),
        pairs=PairsRecipe(count=400_000, batch=5_000, shard=50_000),
        distill=DistillRecipe(steps=30_000, batch=512, train_steps=(0, 3), split=3, ema=0.9995),
        evaluate=EvaluateRecipe(images=50_000, reference=50_000, batch=1_000),
    ),
}

VAR["text-var-tiny"] = dataclasses.replace(
    LLAMAGEN["text-tiny"],
    name="text-var-tiny",
    tokenizer_model=MultiScaleConfig(64, 4, 32, (1, 1, 1, 1), 1, _TINY),
    model=VARConfig(
        depth=2, dim=32, heads=2, codebook_size=64, code_dim=4, sides=_TINY, shared_adaln=True,
        text_tokens=8, text_dim=32,
    ),
    decoder=DecoderRecipe(steps=0, batch=8),
    distill=VAR["var-tiny"].distill,
    evaluate=dataclasses.replace(LLAMAGEN["text-tiny"].evaluate, plans=("dd-1", "dd-2", "teacher")),
    views=2,
)  # fmt: skip
# Pictures of 64 pixels. Tokenizer and teacher begin with what they have in common with those of photographs,
# whose tokenizer already draws recognisable pictograms. Blocks have an adaLN each: the text comes in nowhere
# else. Pictograms are seen by VGG16 as they are: at 64 pixels its last map is not as bare as at 32. A
# teacher of so few pictures learns them by heart unless it reads replaced tokens, and its likelier tokens
# are the better ones. The built-in model had less of it: 3,400 steps of 32 of the teacher, 22,500 pairs at
# `pairs.guidance=2.5`, and 1,900 steps of 32 of the student. The whole has not been run.
VAR["text-var-cpu"] = Recipe(
    name="text-var-cpu",
    data="pictograms",
    text=MiniLMConfig(),
    tokenizer_model=MultiScaleConfig(1024, 16, 32, (1, 2, 2, 4), 1, _CPU),
    model=VARConfig(
        depth=9, dim=192, heads=3, codebook_size=1024, code_dim=16, sides=_CPU,
        text_tokens=16, text_dim=384,
    ),
    begin_from="cifar10",
    tokenizer=TokenizerRecipe(
        steps=5_000, batch=16, lr=8e-4, lpips_share=0.25, continuous_for=0.0,
        adversarial=0.2, judged_from=0.8, judge_lr=1e-3, ramp=0.08, ema=0.998,
    ),
    decoder=DecoderRecipe(steps=0, batch=16),
    teacher=TeacherRecipe(
        steps=12_000, batch=64, lr=2e-3, matrix_lr=3e-3, weight_decay=0.1, replaced=0.3, ema=0.998
    ),
    pairs=PairsRecipe(
        count=100_000, batch=500, shard=2_500, guidance=2.0, temperature=0.4, solver="dpmpp-2m"
    ),
    distill=DistillRecipe(
        steps=5_000, batch=64, train_steps=(0, 3), optimizer="muon", evenness=0.5, cross_entropy=1.0, mse=1.0,
        lpips=0.0, ema=0.998,
    ),
    evaluate=EvaluateRecipe(
        images=1_500, reference=1_500, test=1_500, precision="auto",
        plans=("dd-1", "dd-2", "pre-trained-1-4", "teacher"),
    ),
    train_images=0,
)  # fmt: skip
