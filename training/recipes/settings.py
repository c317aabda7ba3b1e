"""Settings of the whole training: frozen dataclasses, one a stage.

`training.recipes.named` has the recipes that one can ask for by name; every field can be overridden on the
command line as `--set stage.field=value`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dd_core.models.config import (
    ModelConfig,
    TokenizerConfig,
)
from dd_core.text.config import TextConfig


@dataclass(frozen=True)
class TokenizerRecipe:
    """Stage (a). Loss: |x − x̂| + `lpips`·LPIPS + `commitment`·‖z − sg(c)‖².

    `lpips_share` is the share of each batch that the perceptual loss sees: it costs as much as
    the tokenizer itself.
    """

    steps: int
    batch: int
    lr: float = 1e-3
    lpips: float = 1.0
    lpips_share: float = 1.0
    commitment: float = 0.25
    codebook_decay: float = 0.99
    continuous_for: float = 0.05
    ema: float = 0.999


@dataclass(frozen=True)
class DecoderRecipe:
    """Stage (a′). Loss: |x − x̂| + `lpips`·LPIPS + `adversarial`·hinge GAN, codes fixed.

    The adversarial weight grows from 0 over the first `ramp` of the run. `steps` 0 leaves the
    stage out.
    """

    steps: int
    batch: int
    lr: float = 3e-4
    judge_lr: float = 5e-4
    lpips: float = 1.0
    adversarial: float = 0.15
    ramp: float = 0.05
    ema: float = 0.998


@dataclass(frozen=True)
class TeacherRecipe:
    """Stage (b). Cross entropy of the next token; labels dropped to null with `class_dropout`.

    Matrices of the blocks are trained with Muon (`matrix_lr`), the rest with AdamW (`lr`).
    """

    steps: int
    batch: int
    lr: float = 1e-3
    matrix_lr: float = 4e-3
    weight_decay: float = 0.05
    class_dropout: float = 0.1
    ema: float = 0.999


@dataclass(frozen=True)
class PairsRecipe:
    """Stage (c). Algorithm 1: noise → teacher through the flow map → tokens.

    `own` is how many pairs stage (c') makes besides: those begin with the student's tokens.
    """

    count: int
    batch: int
    shard: int = 10_000
    guidance: float = 2.0
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    solver: str = "dpmpp-3m"
    evaluations: int = 10
    own: int = 0


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

    steps: int
    batch: int
    train_steps: tuple[int, ...] = (0, 20)
    start: Literal["teacher", "student", "transplant"] = "teacher"
    layers: int | None = None
    split: int | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    matrix_lr: float = 2e-3
    weight_decay: float = 0.0
    cross_entropy: float = 0.1
    lpips: float = 1.0
    lpips_share: float = 1.0
    mse: float = 0.0
    adversarial: float = 0.0
    judged_share: float = 0.25
    judge_lr: float = 1e-3
    ramp: float = 0.05
    ema: float = 0.999


@dataclass(frozen=True)
class EvaluateRecipe:
    """Stage (e). How many images a plan draws, and how many real ones they are held against.

    `test` real images are reconstructed, and halved for the real split. `precision` is that of
    the Inception network; `auto` is bfloat16 on a CPU that multiplies it in hardware (twice as fast
    there), else float32. `plans` names the plans to measure, and so to offer; none = all.
    """

    images: int
    reference: int
    test: int = 10_000
    batch: int = 250
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

    These say how a stage is computed, not what: `accumulate` parts of a batch go through the model one after
    another; with `recompute` only the inputs of blocks are kept for the backward pass; with `compile` torch
    compiles the blocks. A checkpoint may go on with others of these.
    """

    name: str
    tokenizer_model: TokenizerConfig
    model: ModelConfig
    tokenizer: TokenizerRecipe
    decoder: DecoderRecipe
    teacher: TeacherRecipe
    pairs: PairsRecipe
    distill: DistillRecipe
    evaluate: EvaluateRecipe
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    preview_every: int = 1200
    train_images: int = field(default=50_000)
    data: Literal["cifar10", "pictograms", "prompts"] = "cifar10"
    text: TextConfig | None = None
    views: int = 6
    begin_from: str | None = None
    accumulate: int = 1
    recompute: bool = False
    compile: bool = False

    @property
    def student(self) -> ModelConfig:
        """The student's architecture: the teacher's, with as many blocks as `distill.layers` says."""
        return self.model.with_layers(self.distill.layers or self.model.num_layers)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.model.side * self.tokenizer_model.downsampling
