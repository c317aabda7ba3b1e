"""Stage (a): a VQ tokenizer of either family with perceptual loss and an EMA codebook.

The codebook is not trained by gradients: each code moves to the running mean of the vectors that it
replaced (the encoder's outputs; of a multi-scale tokenizer, what the coarser scales leave of them),
and a code that is hardly ever used is put where such a vector is. The encoder gets the
straight-through gradient and the commitment loss, a multi-scale tokenizer's φ the distance of f̂ to
the encoder's output. Quantisation starts after `continuous_for` of the run: from the first
step on, the commitment loss pulls all outputs to one point before the decoder has taught the
encoder to spread them. A discriminator, where the recipe has one, joins in at `judged_from` of the run: it
sees the maps that LPIPS computes anyway, and what it asks for reaches the codes as well as the decoder.

Shapes: B batch, L tokens, C code dimension, V codebook size.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dd_core.errors import RecipeError
from dd_core.models import build
from dd_core.models.build import AnyTokenizer
from dd_core.models.protocols import Quantized
from dd_core.noise import stream_seed
from dd_core.runtime import mixed_precision
from training import parallel
from training.data.ahead import Ahead, copied, pinned
from training.data.images import ImageSet
from training.losses.adversarial import Adversary, ramp
from training.losses.lpips import Lpips, lpips_weights
from training.losses.perceptual import perceived
from training.metrics.plots import reconstruction_grid
from training.optim.loop import Batches, Ema, Stage, one_cycle, plain, update_at
from training.optim.memory import economical, memory_layout
from training.parallel import Figures
from training.recipes.settings import Recipe
from training.run import Run, begin_with, begun_from, refuse_given, train
from training.stages.tokens import train_images, write_tokens

log = logging.getLogger("dd_train")


class CodebookAverage:
    """Running mean of the vectors assigned to each code of a tokenizer, with revival of unused codes."""

    def __init__(self, tokenizer: AnyTokenizer, decay: float) -> None:
        codebook_VC = tokenizer.codebook_VC
        self.tokenizer, self.decay = tokenizer, decay
        self.count_V = torch.ones(len(codebook_VC), device=codebook_VC.device)
        self.sum_VC = codebook_VC.detach().clone()

    @torch.no_grad()
    def update(self, z_BLC: Tensor, tokens_BL: Tensor) -> None:
        """Moves the codes; draws the replacements of dead ones from `z_BLC`.

        Of several ranks each has the vectors of its own rows of the batch, and zeros in the others.
        """
        size, number, own = len(self.count_V), tokens_BL.numel(), parallel.own_rows()
        z_NC, tokens_N = z_BLC[own].flatten(0, -2), tokens_BL[own].flatten()
        count = parallel.summed(torch.bincount(tokens_N, minlength=size).to(z_NC.dtype))
        total = parallel.summed(torch.zeros_like(self.sum_VC).index_add_(0, tokens_N, z_NC))
        self.count_V.lerp_(count, 1 - self.decay)
        self.sum_VC.lerp_(total, 1 - self.decay)
        # A code drawn less than a twentieth as often as the average one is as good as unused.
        dead = self.count_V < 0.05 * number / size
        level = torch.full_like(self.count_V, number / size)
        self.count_V.copy_(torch.where(dead, level, self.count_V))
        fresh = self._drawn(z_BLC) * level[:, None]
        self.sum_VC.copy_(torch.where(dead[:, None], fresh, self.sum_VC))
        self.tokenizer.set_codes(self.sum_VC / self.count_V[:, None])

    @torch.no_grad()
    def reseed(self, z_BLC: Tensor) -> None:
        """Puts every code on a random vector, as if drawn equally often."""
        size, number = len(self.count_V), z_BLC.shape[:-1].numel()
        self.count_V.fill_(number / size)
        self.sum_VC.copy_(self._drawn(z_BLC) * number / size)
        self.tokenizer.set_codes(self.sum_VC / self.count_V[:, None])

    def _drawn(self, z_BLC: Tensor) -> Tensor:
        """A random vector of the batch for each code: one rank has it, and the others have zeros."""
        z_NC = z_BLC.flatten(0, -2)
        place = torch.randint(len(z_NC), (len(self.count_V),), device=z_NC.device)
        return parallel.summed(z_NC[place])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count_V, "sum": self.sum_VC}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.count_V.copy_(state["count"])
        self.sum_VC.copy_(state["sum"])


def new_tokenizer(recipe: Recipe, device: torch.device) -> AnyTokenizer:
    """A freshly initialised tokenizer, the same for the same seed on every device."""
    torch.manual_seed(stream_seed(recipe.seed, 0, "tokenizer-init"))
    fresh = build.new_tokenizer(recipe.tokenizer_model)
    return fresh.to(device=device, memory_format=memory_layout(device))  # type: ignore[call-overload, no-any-return]


class _Assigned:
    """The vectors that codes replaced, and the codes, of a batch that goes through the model in parts."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.vectors_BLC = self.tokens_BL = torch.empty(0)

    def add(self, rows: slice, coded: Quantized) -> None:
        """The rows of a part; those that are other ranks' stay zeros."""
        if not len(self.vectors_BLC):
            self.vectors_BLC = coded.vectors_BLC.new_zeros(self.count, *coded.vectors_BLC.shape[1:])
            self.tokens_BL = coded.tokens_BL.new_zeros(self.count, *coded.tokens_BL.shape[1:])
        self.vectors_BLC[rows], self.tokens_BL[rows] = coded.vectors_BLC, coded.tokens_BL


def tokenizer_stage(
    recipe: Recipe, images: ImageSet, lpips: Lpips, device: torch.device, first: AnyTokenizer | None = None
) -> tuple[Stage, Ema]:
    """The stage, and the average whose weights are the result.

    Args:
        first: a tokenizer to begin with: all of it that fits. Of the same architecture its codes are spread
            already, and `continuous_for` can be 0.

    Raises:
        RecipeError: nothing of `first` fits.
    """
    cfg = recipe.tokenizer
    model = new_tokenizer(recipe, device)
    if first is not None and not begin_with(recipe, first, model, "tokenizer"):
        raise RecipeError(f"nothing of the tokenizer of {recipe.begin_from} fits", param="begin_from")
    lpips = lpips.to(device)
    adversary = Adversary(cfg.judge_lr, recipe.seed, device) if cfg.adversarial else None
    trained = [p for n, p in model.named_parameters() if n != "codebook_raw"]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "peak": cfg.lr}], lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    average, ema = CodebookAverage(model, cfg.codebook_decay), Ema(model, cfg.ema)
    batches = Batches(len(images.images), cfg.batch, recipe.seed)
    first_quantised, first_judged = (int(part * cfg.steps) for part in (cfg.continuous_for, cfg.judged_from))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "codebook": average, "ema": ema}
    if adversary is not None:
        state |= {"judge": adversary.judge, "judging": adversary.optimizer}
    figure_names = ["l1", "lpips", "commit"] + (["fooled", "hinge"] if adversary is not None else [])
    parts = parallel.parts(batches.count, recipe.accumulate, "tokenizer.batch")
    economical(recipe, [*model.encoder.blocks, *model.decoder.blocks])

    def load(step: int) -> list[Tensor]:
        chosen = batches.at(step)
        return [pinned(images.batch(chosen[part.rows])[0], device) for part in parts]

    ahead = Ahead(load, cfg.steps)

    def update(step: int) -> dict[str, Tensor]:
        flip, quantise = torch.rand(batches.count) < 0.5, step >= first_quantised
        factor, judge = one_cycle(step, cfg.steps, 1.0), adversary if step >= first_judged else None
        weight = cfg.adversarial * ramp(step - first_judged, cfg.ramp * cfg.steps)
        seen = max(1, round(cfg.lpips_share * batches.count))
        assigned = _Assigned(batches.count)
        figures = Figures(device, *figure_names)
        for part, image in zip(parts, ahead.at(step), strict=True):
            x, share = copied(image, device), len(image) / batches.count
            x = torch.where(flip[part.rows].to(device)[:, None, None, None], x.flip(3), x)
            x = x.contiguous(memory_format=memory_layout(device))
            with mixed_precision(device):
                z = model.encode_continuous(x).float()
                coded = model.quantize(z)
                recon = model.decode_continuous(z + (coded.z - z).detach() if quantise else z).float()
            found = {"l1": share * (recon - x).abs().mean(), "commit": share * coded.commitment}
            loss = found["l1"]
            if n := part.among(seen):
                found |= perceived(lpips, judge, x[:n], recon[:n], n / seen, cfg.enlarged)
                loss = loss + cfg.lpips * found["lpips"] + weight * found.get("fooled", 0.0)
            if quantise:
                loss = loss + cfg.commitment * found["commit"] + share * coded.fit
            loss.backward()  # type: ignore[no-untyped-call]
            figures.add(**found)
            assigned.add(part.rows, coded)
        parallel.sum_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        update_at(optimizer, factor)
        if judge is not None:
            judge.step(factor)
        if quantise:
            average.update(assigned.vectors_BLC, assigned.tokens_BL)
        else:
            average.reseed(assigned.vectors_BLC)
        ema.update(model)
        in_use = average.count_V > 0.1 * assigned.tokens_BL.numel() / len(average.count_V)
        return {**figures.total(), "codes_in_use": in_use.float().mean()}

    def preview(path: Path) -> None:
        averaged = new_tokenizer(recipe, device)
        averaged.load_state_dict(ema.average)
        x, _ = images.batch(torch.arange(len(images.labels))[:32])
        with torch.no_grad():
            recon = averaged.decode_tokens(averaged.encode(x.to(device)))
        reconstruction_grid(x, recon, path)

    config = {
        "tokenizer_model": asdict(recipe.tokenizer_model),
        "tokenizer": asdict(cfg),
        "seed": recipe.seed,
    }
    return Stage("tokenizer", cfg.steps, state, update, batches, preview, plain(config)), ema


def run(run: Run) -> None:
    """Stage (a), and the tokens of all training images.

    Raises:
        RecipeError: the folder was given a tokenizer.
    """
    refuse_given(run, "tokenizer")
    with parallel.in_turn():
        images, lpips = train_images(run), Lpips(lpips_weights())
        first = begun_from(run).sampler.tokenizer if run.recipe.begin_from else None
    assert first is None or isinstance(first, AnyTokenizer)
    stage, ema = tokenizer_stage(run.recipe, images, lpips, run.device, first)
    if train(run, stage, ema, build.new_tokenizer(run.recipe.tokenizer_model)):
        write_tokens(run)
