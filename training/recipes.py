"""Named settings of the whole training: `tiny` (tests), `cpu` (two cores, one afternoon), `gpu`.

A recipe is frozen dataclasses, one a stage; every field can be overridden on the command line
as `--set stage.field=value`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from dd_core.errors import RecipeError
from dd_core.models.config import LlamaGenConfig, VQConfig
from dd_core.text.config import MiniLMConfig, T5Config, TextConfig
from training.overrides import overridden

# Kinds of settings, with their bounds.
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Solver = Literal["euler", "dpmpp-2m", "dpmpp-3m"]  # of `dd_core.flow`


@dataclass(frozen=True)
class TokenizerRecipe:
    """Stage (a). Loss: |x − x̂| + `lpips`·LPIPS + `commitment`·‖z − sg(c)‖².

    `lpips_share` is the share of each batch that the perceptual loss sees: it costs as much as
    the tokenizer itself.
    """

    steps: CountOrNone
    batch: Count
    lr: Rate = 1e-3
    lpips: Weight = 1.0
    lpips_share: Share = 1.0
    commitment: Weight = 0.25
    codebook_decay: Decay = 0.99
    continuous_for: Part = 0.05
    ema: Decay = 0.999


@dataclass(frozen=True)
class DecoderRecipe:
    """Stage (a′). Loss: |x − x̂| + `lpips`·LPIPS + `adversarial`·hinge GAN, codes fixed.

    The adversarial weight grows from 0 over the first `ramp` of the run. `steps` 0 leaves the
    stage out.
    """

    steps: CountOrNone
    batch: Count
    lr: Rate = 3e-4
    judge_lr: Rate = 5e-4
    lpips: Weight = 1.0
    adversarial: Weight = 0.15
    ramp: Part = 0.05
    ema: Decay = 0.998


@dataclass(frozen=True)
class TeacherRecipe:
    """Stage (b). Cross entropy of the next token; labels dropped to null with `class_dropout`.

    Matrices of the blocks are trained with Muon (`matrix_lr`), the rest with AdamW (`lr`).
    """

    steps: CountOrNone
    batch: Count
    lr: Rate = 1e-3
    matrix_lr: Rate = 4e-3
    weight_decay: Weight = 0.05
    class_dropout: Part = 0.1
    ema: Decay = 0.999


@dataclass(frozen=True)
class PairsRecipe:
    """Stage (c). Algorithm 1: noise → teacher through the flow map → tokens.

    `own` is how many pairs stage (c') makes besides: those begin with the student's tokens.
    """

    count: Count
    batch: Count
    shard: Count = 10_000
    guidance: Weight = 2.0
    top_k: CountOrNone = 0
    top_p: Share = 1.0
    temperature: Rate = 1.0
    solver: Solver = "dpmpp-3m"
    evaluations: Count = 10
    own: CountOrNone = 0


@dataclass(frozen=True)
class DistillRecipe:
    """Stage (d). Algorithm 2 with the losses of App. B and C.

    Loss: `cross_entropy`·CE(logits) + `lpips`·LPIPS(decoder(embeddings)) + `mse`·‖embedding − code‖²
    + `adversarial`·hinge GAN(decoder(tokens)). The adversarial weight grows from 0 over the first `ramp` of
    the run; `lpips_share` and `judged_share` are the parts of a batch that are decoded for the two.
    `train_steps` is the set {t_k} from which t is drawn uniformly (0-based blocks).
    `optimizer` is `adamw` (0.9, 0.95) as in the paper, or `muon` for the blocks' matrices.
    `start` says whose weights the student begins with: the `teacher`'s, as in line 1 of Algorithm 2,
    those of the `student` that the run was started from (`dd-train start`), or a `transplant`: the
    teacher's, moved by what distillation changed in the bundle that the run began from.
    `layers` is the student's number of blocks (None = the teacher's): more than it begins with are put in as
    the identity.
    `split` is which head the offered plans use: tokens of blocks before it come from the logits, the
    others are the embedding head's vectors (`Plan.split`); None = all from the logits.
    """

    steps: CountOrNone
    batch: Count
    train_steps: Annotated[tuple[CountOrNone, ...], Field(min_length=1)] = (0, 20)
    start: Literal["teacher", "student", "transplant"] = "teacher"
    layers: Count | None = None
    split: CountOrNone | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 1e-3
    matrix_lr: Rate = 2e-3
    weight_decay: Weight = 0.0
    cross_entropy: Weight = 0.1
    lpips: Weight = 1.0
    lpips_share: Share = 1.0
    mse: Weight = 0.0
    adversarial: Weight = 0.0
    judged_share: Share = 0.25
    judge_lr: Rate = 1e-3
    ramp: Part = 0.05
    ema: Decay = 0.999


@dataclass(frozen=True)
class EvaluateRecipe:
    """Stage (e). How many images a plan draws, and how many real ones they are held against.

    `test` real images are reconstructed, and halved for the real split. `precision` is that of
    the Inception network; `auto` is bfloat16 on a CPU that multiplies it in hardware (twice as fast
    there), else float32. `plans` names the plans to measure, and so to offer; none = all.
    """

    images: CountOrNone
    reference: CountOrNone
    test: Count = 10_000
    batch: Count = 250
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    plans: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Everything that `dd-train` needs to make a bundle.

    `data` is what the images are: CIFAR-10 with its classes, or the pictograms with their captions,
    which `text` encodes; `views` of each picture are learned from. Of `prompts` there are no images: such a
    run is started from a bundle with a teacher, and has the stages (c) and (d) only.
    `begin_from` names a bundle of the same architecture: stage (a) begins with its tokenizer, stage (b)
    with those tensors of its teacher that have the right shape (all but the condition's).
    """

    name: str
    vq: VQConfig
    gpt: LlamaGenConfig
    tokenizer: TokenizerRecipe
    decoder: DecoderRecipe
    teacher: TeacherRecipe
    pairs: PairsRecipe
    distill: DistillRecipe
    evaluate: EvaluateRecipe
    seed: Seed = 0
    log_every: Count = 20
    save_every: Count = 200
    preview_every: Count = 1200
    train_images: CountOrNone = field(default=50_000)
    data: Literal["cifar10", "pictograms", "prompts"] = "cifar10"
    text: TextConfig | None = None
    views: Count = 6
    begin_from: str | None = None

    @property
    def student(self) -> LlamaGenConfig:
        """The student's architecture: the teacher's, with as many blocks as `distill.layers` says."""
        return dataclasses.replace(self.gpt, layers=self.distill.layers or self.gpt.layers)


RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        name="tiny",
        vq=VQConfig(64, 4, 32, 32, (1, 1, 1), 1),
        gpt=LlamaGenConfig(layers=2, heads=2, dim=32, codebook_size=64, code_dim=4, grid=8, num_classes=10),
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
        vq=VQConfig(1024, 8, 128, 32, (1, 2, 4), 1),
        gpt=LlamaGenConfig(
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
        vq=VQConfig(1024, 8, 128, 64, (1, 2, 2), 2),
        gpt=LlamaGenConfig(
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

RECIPES["text-tiny"] = dataclasses.replace(
    RECIPES["tiny"],
    name="text-tiny",
    data="pictograms",
    text=MiniLMConfig(length=8, vocabulary=13, dim=32, layers=2, heads=4, hidden=48),
    gpt=LlamaGenConfig(
        layers=2, heads=2, dim=32, codebook_size=64, code_dim=4, grid=8, text_tokens=8, text_dim=32
    ),
    evaluate=EvaluateRecipe(images=12, reference=10, test=24, batch=8),
)
# Two cores for about two hours. Tokenizer and teacher begin as those of the built-in model of classes:
# its tokenizer draws recognisable pictograms before it has seen any.
RECIPES["text-cpu"] = Recipe(
    name="text-cpu",
    data="pictograms",
    text=MiniLMConfig(),
    vq=VQConfig(1024, 8, 128, 32, (1, 2, 4), 1),
    gpt=LlamaGenConfig(
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
        start="transplant",
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
RECIPES["text-gpu"] = dataclasses.replace(
    RECIPES["gpu"],
    name="text-gpu",
    data="pictograms",
    text=MiniLMConfig(),
    gpt=LlamaGenConfig(
        layers=8, heads=5, dim=320, codebook_size=1024, code_dim=8, grid=8, text_tokens=16, text_dim=384
    ),
    evaluate=EvaluateRecipe(images=1_170, reference=1_170, test=5_000, batch=585),
    train_images=0,
)


# The student that was never published, by the paper's numbers: pairs of three million prompts, steps 0 and
# 80, AdamW at 10⁻⁴ in batches of 512, 70 epochs. Not run here.
RECIPES["llamagen-t2i"] = Recipe(
    name="llamagen-t2i",
    data="prompts",
    text=T5Config(),
    vq=VQConfig(),
    gpt=LlamaGenConfig(layers=36, heads=20, dim=1280, text_tokens=120, text_dim=2048),
    tokenizer=TokenizerRecipe(steps=0, batch=1),
    decoder=DecoderRecipe(steps=0, batch=1),
    teacher=TeacherRecipe(steps=0, batch=1),
    pairs=PairsRecipe(count=3_000_000, batch=256, guidance=7.5, top_k=1000),
    distill=DistillRecipe(steps=410_000, batch=512, train_steps=(0, 80), lr=1e-4, ema=0.9999),
    evaluate=EvaluateRecipe(images=0, reference=0),
    save_every=1_000,
)


def get_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A named recipe with `stage.field=value` overrides.

    Raises:
        RecipeError: unknown recipe, stage or field; a value that the field does not take, or that
            contradicts another one.
    """
    if name not in RECIPES:
        raise RecipeError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}", param="recipe")
    recipe = RECIPES[name]
    for item in overrides:
        recipe = overridden(recipe, item)
    for field_name, broken, rule in _rules(recipe):
        if broken:
            raise RecipeError(f"{field_name} must {rule}", param=field_name)
    return recipe


def _rules(recipe: Recipe) -> Iterator[tuple[str, object, str]]:
    """Yield what fields demand of each other: a field, true if it breaks the rule, and the rule."""
    vq, gpt, text, distill, evaluate = recipe.vq, recipe.gpt, recipe.text, recipe.distill, recipe.evaluate
    blocks, pictured = gpt.layout.num_blocks, recipe.data != "prompts"
    yield "gpt.codebook_size", gpt.codebook_size != vq.codebook_size, f"be vq's, {vq.codebook_size}"
    yield "gpt.code_dim", gpt.code_dim != vq.code_dim, f"be vq's, {vq.code_dim}"
    yield "gpt.heads", gpt.dim % gpt.heads, f"divide gpt.dim, {gpt.dim}"
    pixels = gpt.grid * vq.downsampling
    yield "gpt.grid", pictured and pixels != 32, f"make pictures of 32 pixels with vq, not of {pixels}"
    classes = recipe.data == "cifar10"
    yield "gpt.num_classes", classes and gpt.num_classes != 10, "be 10, the classes of CIFAR-10"
    yield "data", classes != (text is None), "be cifar10 without text, pictograms or prompts with it"
    if text is not None:
        yield "gpt.text_tokens", gpt.text_tokens != text.length, f"be text.length, {text.length}"
        yield "gpt.text_dim", gpt.text_dim != text.dim, f"be text.dim, {text.dim}"
    steps = distill.train_steps
    within = all(t < blocks for t in steps) and len(set(steps)) == len(steps)
    yield "distill.train_steps", not within, f"be different steps of 0..{blocks - 1}"
    yield "distill.split", (distill.split or 0) > blocks, f"be at most {blocks}, the number of blocks"
    yield (
        "distill.layers",
        (distill.layers or gpt.layers) < gpt.layers,
        f"be at least gpt.layers, {gpt.layers}",
    )
    lost = distill.start == "transplant" and recipe.begin_from is None
    yield "begin_from", lost, "name a bundle for distill.start=transplant"
    yield "evaluate.images", pictured and evaluate.images < 2, "be at least 2"
    yield "evaluate.reference", pictured and evaluate.reference < 2, "be at least 2"
