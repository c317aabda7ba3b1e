"""Recipes of the published teachers of classes: the paper's students (App. C), from the authors' checkpoints.

1.2 million pairs at guidance 2.0, batches of 512, AdamW (0.9, 0.95), EMA 0.9999, 1.0·LPIPS + 0.1·cross
entropy; VAR 120 epochs at 10⁻⁴ for every 256 images of a batch, LlamaGen 70 epochs at 10⁻⁴.
The steps that a student
jumps from, the heads' split and how the teacher draws are those of the released scripts. There are no images:
`dd-train start var-d16 --recipe var-dd-d16` begins such a run. Sized by the paper, not run here.
"""

from __future__ import annotations

from dd_core.hub.registry import find_spec
from training.recipes.settings import (
    DecoderRecipe,
    DistillRecipe,
    EvaluateRecipe,
    PairsRecipe,
    Recipe,
    TeacherRecipe,
    TokenizerRecipe,
)

_PAIRS, _BATCH = 1_200_000, 512
_LR = 1e-4
_VAR_EPOCHS, _LLAMAGEN_EPOCHS = 120, 70
# Depth → the second step's first scale, which is also the first scale of the embedding head.
_VAR_SECOND = {16: 5, 20: 4, 24: 4}
# Size → the first token of the embedding head.
_LLAMAGEN_SPLIT = {"b": 80, "l": 130}


def _published(teacher: str, student: str, epochs: int, lr: float, second: int, split: int) -> Recipe:
    base, draw = find_spec(teacher), find_spec(student).draw
    assert base.teacher is not None, "the name is a teacher's"
    return Recipe(
        name=student,
        data="none",
        tokenizer_model=base.vq,
        model=base.teacher,
        tokenizer=TokenizerRecipe(steps=0, batch=1),
        decoder=DecoderRecipe(steps=0, batch=1),
        teacher=TeacherRecipe(steps=0, batch=1),
        pairs=PairsRecipe(
            count=_PAIRS,
            batch=64,
            guidance=draw.guidance,
            guidance_schedule=draw.guidance_schedule,
            top_k=draw.top_k,
            top_p=draw.top_p,
        ),
        distill=DistillRecipe(
            steps=epochs * _PAIRS // _BATCH,
            batch=_BATCH,
            train_steps=(0, second),
            split=split,
            lr=lr,
            cross_entropy=0.1,
            lpips=1.0,
            ema=0.9999,
        ),
        evaluate=EvaluateRecipe(images=0, reference=0),
        save_every=1_000,
    )


PUBLISHED: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(
            _published(f"var-d{depth}", f"var-dd-d{depth}", _VAR_EPOCHS, _LR * _BATCH / 256, second, second)
            for depth, second in _VAR_SECOND.items()
        ),
        *(
            _published(f"llamagen-{size}-256", f"llamagen-dd-{size}", _LLAMAGEN_EPOCHS, _LR, 80, split)
            for size, split in _LLAMAGEN_SPLIT.items()
        ),
    )
}
