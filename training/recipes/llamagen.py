"""Recipes of LlamaGen's family: raster order, of classes and of texts."""

from __future__ import annotations

import dataclasses

from dd_core.models.config import LlamaGenConfig, VQConfig
from dd_core.text.config import MiniLMConfig, T5Config
from training.recipes.settings import (
    DecoderRecipe,
    DistillRecipe,
    EvaluateRecipe,
    PairsRecipe,
    Recipe,
    TeacherRecipe,
    TokenizerRecipe,
)

LLAMAGEN: dict[str, Recipe] = {
    "tiny": Recipe(
        name="tiny",
        tokenizer_model=VQConfig(64, 4, 32, 32, (1, 1, 1), 1),
        model=LlamaGenConfig(layers=2, heads=2, dim=32, codebook_size=64, code_dim=4, grid=8, num_classes=10),
        tokenizer=TokenizerRecipe(steps=6, batch=8, lpips_share=0.5),
        decoder=DecoderRecipe(steps=6, batch=8),
        teacher=TeacherRecipe(steps=6, batch=8),
        pairs=PairsRecipe(count=48, batch=16, shard=16),
        distill=DistillRecipe(steps=6, batch=8, train_steps=(0, 20), lpips_share=0.5, mse=1.0),
        evaluate=EvaluateRecipe(images=16, reference=32, test=32, batch=16),
        log_every=2,
        save_every=2,
        preview_every=6,
        train_images=256,
    ),
    "cpu": Recipe(
        name="cpu",
        tokenizer_model=VQConfig(1024, 8, 128, 32, (1, 2, 4), 1),
        model=LlamaGenConfig(
            layers=8, heads=3, dim=192, codebook_size=1024, code_dim=8, grid=8, num_classes=10
        ),
        tokenizer=TokenizerRecipe(steps=2700, batch=32, lpips_share=0.375),
        decoder=DecoderRecipe(steps=2400, batch=16),
        teacher=TeacherRecipe(steps=3600, batch=64, lr=2e-3, matrix_lr=3e-3),
        pairs=PairsRecipe(count=20_000, batch=500, shard=5_000),
        distill=DistillRecipe(
            steps=1500, batch=64, optimizer="muon", cross_entropy=1.0, mse=1.0, lpips_share=0.0625, ema=0.998
        ),
        evaluate=EvaluateRecipe(images=5_000, reference=10_000, precision="auto"),
    ),
    # Sized for half an hour of one data-centre GPU and a bundle under 60 MiB.
    "gpu": Recipe(
        name="gpu",
        tokenizer_model=VQConfig(1024, 8, 128, 64, (1, 2, 2), 2),
        model=LlamaGenConfig(
            layers=8, heads=5, dim=320, codebook_size=1024, code_dim=8, grid=8, num_classes=10
        ),
        tokenizer=TokenizerRecipe(steps=8_000, batch=256),
        decoder=DecoderRecipe(steps=8_000, batch=128, ema=0.999),
        teacher=TeacherRecipe(steps=10_000, batch=512, lr=2e-3, matrix_lr=3e-3),
        pairs=PairsRecipe(count=400_000, batch=5_000, shard=50_000),
        distill=DistillRecipe(steps=30_000, batch=512, ema=0.9995),
        evaluate=EvaluateRecipe(images=50_000, reference=50_000, batch=1_000),
    ),
}

LLAMAGEN["text-tiny"] = dataclasses.replace(
    LLAMAGEN["tiny"],
    name="text-tiny",
    data="pictograms",
    text=MiniLMConfig(length=8, vocabulary=13, dim=32, layers=2, heads=4, hidden=48),
    model=LlamaGenConfig(
        layers=2, heads=2, dim=32, codebook_size=64, code_dim=4, grid=8, text_tokens=8, text_dim=32
    ),
    evaluate=EvaluateRecipe(images=12, reference=10, test=24, batch=8),
)
# The tokenizer begins with encoder and decoder of the built-in model of classes, which draw recognisable
# pictograms before they have seen any; of its teacher, which is of the other family, nothing fits.
LLAMAGEN["text-cpu"] = Recipe(
    name="text-cpu",
    data="pictograms",
    text=MiniLMConfig(),
    tokenizer_model=VQConfig(1024, 8, 128, 32, (1, 2, 4), 1),
    model=LlamaGenConfig(
        layers=8, heads=3, dim=192, codebook_size=1024, code_dim=8, grid=8, text_tokens=16, text_dim=384
    ),
    begin_from="cifar10",
    tokenizer=TokenizerRecipe(
        steps=4_500, batch=32, lr=7e-4, lpips_share=0.25, continuous_for=0.0, ema=0.998
    ),
    decoder=DecoderRecipe(steps=0, batch=16),
    teacher=TeacherRecipe(steps=5_000, batch=64, lr=2e-3, matrix_lr=3e-3, ema=0.998),
    pairs=PairsRecipe(count=36_000, batch=500, shard=2_000),
    distill=DistillRecipe(
        steps=3_500,
        batch=64,
        optimizer="muon",
        cross_entropy=1.0,
        mse=1.0,
        lpips=0.0,
        ema=0.998,
    ),
    evaluate=EvaluateRecipe(
        images=1_000,
        reference=1_000,
        test=1_000,
        precision="auto",
        plans=("dd-1", "dd-2", "pre-trained-1-21", "teacher"),
    ),
    train_images=0,
)
# Sized like `gpu`, by arithmetic and not yet run: nothing is carried over, and every prompt has pairs.
LLAMAGEN["text-gpu"] = dataclasses.replace(
    LLAMAGEN["gpu"],
    name="text-gpu",
    data="pictograms",
    text=MiniLMConfig(),
    model=LlamaGenConfig(
        layers=8, heads=5, dim=320, codebook_size=1024, code_dim=8, grid=8, text_tokens=16, text_dim=384
    ),
    evaluate=EvaluateRecipe(images=1_170, reference=1_170, test=5_000, batch=585),
    train_images=0,
)


# The student that was never published, by the paper's numbers: pairs of three million prompts, steps 0 and
# 80, AdamW at 10⁻⁴ in batches of 512, 70 epochs. Not run here.
LLAMAGEN["llamagen-t2i"] = Recipe(
    name="llamagen-t2i",
    data="none",
    text=T5Config(),
    tokenizer_model=VQConfig(),
    model=LlamaGenConfig(layers=36, heads=20, dim=1280, text_tokens=120, text_dim=2048),
    tokenizer=TokenizerRecipe(steps=0, batch=1),
    decoder=DecoderRecipe(steps=0, batch=1),
    teacher=TeacherRecipe(steps=0, batch=1),
    pairs=PairsRecipe(count=3_000_000, batch=64, guidance=7.5, top_k=1000),
    distill=DistillRecipe(steps=410_000, batch=512, train_steps=(0, 80), lr=1e-4, ema=0.9999),
    evaluate=EvaluateRecipe(images=0, reference=0),
    save_every=1_000,
)
