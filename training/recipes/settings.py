"""Settings of the whole training: frozen dataclasses, one a stage.

`training.recipes.named` has the recipes that one can ask for by name; every field can be overridden on the
command line as `--set stage.field=value`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from dd_core.logits import LogitSettings
from dd_core.models.config import (
    STRICT,
    ModelConfig,
    TokenizerConfig,
)
from dd_core.text.config import TextConfig

# Kinds of settings, with their bounds.
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Enlarged = Annotated[int, Field(ge=1, le=16)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Solver = Literal["euler", "dpmpp-2m", "dpmpp-3m"]  # of `dd_core.flow`


@dataclass(frozen=True)
class TokenizerRecipe:
    """Stage (a). Loss: |x − x̂| + `lpips`·LPIPS + `commitment`·‖z − sg(c)‖² + `adversarial`·hinge GAN.

    `lpips_share` is the share of each batch that the perceptual loss and the discriminator see, `enlarged` so
    many times: it costs as much as the tokenizer itself. The discriminator begins at `judged_from` of the
    run, and its weight grows from 0 over the next `ramp` of it.
    """

    steps: CountOrNone
    batch: Count
    lr: Rate = 1e-3
    lpips: Weight = 1.0
    lpips_share: Share = 1.0
    enlarged: Enlarged = 1
    commitment: Weight = 0.25
    codebook_decay: Decay = 0.99
    continuous_for: Part = 0.05
    adversarial: Weight = 0.0
    judged_from: Part = 0.5
    judge_lr: Rate = 5e-4
    ramp: Part = 0.05
    ema: Decay = 0.999


@dataclass(frozen=True)
class DecoderRecipe:
    """Stage (a′). Loss: |x − x̂| + `lpips`·LPIPS + `adversarial`·hinge GAN, codes fixed.

    The adversarial weight grows from 0 over the first `ramp` of the run. VGG16 sees pictures `enlarged` so
    many times. With `drawn` the discriminator also sees pictures of the teacher's tokens, that part of a
    batch as many: the decoder learns from what it will be given, and not only from what an encoder found.
    `steps` 0 leaves the stage out.
    """

    steps: CountOrNone
    batch: Count
    lr: Rate = 3e-4
    judge_lr: Rate = 5e-4
    lpips: Weight = 1.0
    enlarged: Enlarged = 1
    drawn: Part = 0.0
    adversarial: Weight = 0.15
    ramp: Part = 0.05
    ema: Decay = 0.998


@dataclass(frozen=True)
class TeacherRecipe:
    """Stage (b). Cross entropy of the next token; labels dropped to null with `class_dropout`.

    Matrices of the blocks are trained with Muon (`matrix_lr`), the rest with AdamW (`lr`). Of an image's
    tokens up to `replaced` are others where the teacher reads them; later scales, if there are any, make up
    for it.
    """

    steps: CountOrNone
    batch: Count
    lr: Rate = 1e-3
    matrix_lr: Rate = 4e-3
    weight_decay: Weight = 0.05
    class_dropout: Part = 0.1
    replaced: Part = 0.0
    ema: Decay = 0.999


@dataclass(frozen=True)
class PairsRecipe:
    """Stage (c). Algorithm 1: noise → teacher through the flow map → tokens.

    `guidance` grows over the blocks where `guidance_schedule` is `linear`, as VAR's does.
    `own` is how many pairs stage (c') makes besides: those begin with the student's tokens.
    """

    count: Count
    batch: Count
    shard: Count = 10_000
    guidance: Weight = 2.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    top_k: CountOrNone = 0
    top_p: Share = 1.0
    temperature: Rate = 1.0
    solver: Solver = "dpmpp-3m"
    evaluations: Count = 10
    own: CountOrNone = 0

    @property
    def draw_settings(self) -> LogitSettings:
        """The teacher's distribution as the pairs are drawn from it."""
        return LogitSettings(
            guidance=self.guidance,
            guidance_schedule=self.guidance_schedule,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


@dataclass(frozen=True)
class DistillRecipe:
    """Stage (d). Algorithm 2 with the losses of App. B and C.

    Loss: `cross_entropy`·CE(logits) + `lpips`·LPIPS(decoder(embeddings)) + `mse`·‖embedding − code‖²
    + `adversarial`·hinge GAN(decoder(tokens)). The adversarial weight grows from 0 over the first `ramp` of
    the run; `lpips_share` and `judged_share` are the parts of a batch that are decoded for the two, and VGG16
    sees those pictures `enlarged` so many times.
    `train_steps` is the set {t_k} from which t is drawn uniformly (0-based blocks).
    `optimizer` is `adamw` (0.9, 0.95) as in the paper, or `muon` for the blocks' matrices.
    `start` says whose weights the student begins with: the `teacher`'s, as in line 1 of Algorithm 2,
    those of the `student` that the run was started from (`dd-train start`), or a `transplant`: the
    teacher's, moved by what distillation changed in the bundle that the run began from.
    `layers` is the student's number of blocks (None = the teacher's): more than it begins with are put in as
    the identity.
    `pairs` keeps the first pairs only; 0 keeps all.
    `evenness` is how much the tokens of a block of n count for less, by n^−`evenness`: with 0 every token
    counts alike, which makes most of the loss the last scales'; with 1 every scale counts alike.
    `split` is which head the offered plans use: tokens of blocks before it come from the logits, the
    others are the embedding head's vectors (`Plan.split`); None = all from the logits.
    """

    steps: CountOrNone
    batch: Count
    train_steps: Annotated[tuple[CountOrNone, ...], Field(min_length=1)] = (0, 20)
    start: Literal["teacher", "student", "transplant"] = "teacher"
    layers: Count | None = None
    split: CountOrNone | None = None
    pairs: CountOrNone = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 1e-3
    matrix_lr: Rate = 2e-3
    weight_decay: Weight = 0.0
    evenness: Part = 0.0
    cross_entropy: Weight = 0.1
    lpips: Weight = 1.0
    lpips_share: Share = 1.0
    enlarged: Enlarged = 1
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
class Folder:
    """Your own images, as `dd-train --data` found them: where, their classes, how many, and a hash of all."""

    path: str
    classes: tuple[str, ...]
    images: int
    digest: str


@dataclass(frozen=True)
class Recipe:
    """Everything that `dd-train` needs to make a bundle.

    `data` is what the images are: CIFAR-10 with its classes; those of a `folder`; or the pictograms with
    their captions, which `text` encodes; `views` of each picture are learned from. With `none` there
    are no images: such a run is started from a bundle with a teacher, has the stages (c) and (d), and is
    measured against a reference.
    `train_images` keeps the first ones only; 0 keeps all. `mirror` says that an image's mirror image is as
    good, which it is not of letters.
    `begin_from` names a bundle: stages (a) and (b) begin with those tensors of its tokenizer and teacher that
    are there by the same names and shapes. Of the same architecture that is all but the teacher's condition.

    Teacher and distillation keep an export of the averaged weights every `keep_every` updates, and
    distillation measures the FID of the student's plans every `evaluate_every`, by `evaluate`'s numbers of
    images; 0 = never.

    These say how a stage is computed, not what: `accumulate` parts of a batch go through the model one after
    another; with `recompute` only the inputs of blocks are kept for the backward pass; with `compile` torch
    compiles the blocks. With `tensorboard` the figures of a stage are written as TensorBoard's events too. A
    checkpoint may go on with others of these.
    """

    __pydantic_config__ = STRICT  # for `recipe.json`

    name: str
    tokenizer_model: TokenizerConfig
    model: ModelConfig
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
    keep_every: CountOrNone = 0
    evaluate_every: CountOrNone = 0
    train_images: CountOrNone = field(default=50_000)
    data: Literal["cifar10", "folder", "pictograms", "none"] = "cifar10"
    folder: Folder | None = None
    mirror: bool = True
    text: TextConfig | None = None
    views: Count = 6
    begin_from: str | None = None
    accumulate: Count = 1
    recompute: bool = False
    compile: bool = False
    tensorboard: bool = False

    @property
    def student(self) -> ModelConfig:
        """The student's architecture: the teacher's, with as many blocks as `distill.layers` says."""
        return self.model.with_layers(self.distill.layers or self.model.num_layers)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.model.side * self.tokenizer_model.downsampling
