"""Stage (a′): the tokenizer's decoder against a discriminator, with the codes held fixed.

    tokens ─▶ code vectors ─▶ decoder ─▶ image ─▶ L1 + LPIPS + adversarial

L1 and LPIPS alone leave a decoder that averages over what 64 codes cannot say, and blurred
pictures are far from real ones in FID. Encoder and codebook stay as they are, so teacher, pairs
and student stay valid. Where distillation judges pictures, they are this decoder's, so it comes first.

A teacher's tokens are not those of any photograph. With `decoder.drawn` the discriminator sees pictures of
such tokens too, the final ones of the run's pairs, which then must be there.

Shapes: B batch, N images, P pairs, L tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dd_core.codebook import lookup
from dd_core.models.build import AnyTokenizer, new_tokenizer
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
from training.run import Run, load_tokenizer, train
from training.stages.pairs import FOLDER, load_pairs
from training.stages.tokens import read_tokens, train_images


def decoder_stage(
    recipe: Recipe,
    images: ImageSet,
    tokens_FNL: Tensor,
    tokenizer: AnyTokenizer,
    lpips: Lpips,
    device: torch.device,
    drawn_PL: Tensor | None = None,
) -> tuple[Stage, Ema]:
    """The stage, and the average whose weights are the result: a whole tokenizer.

    Args:
        tokens_FNL: codes of all images and of their mirror images, `[2, N, L]`.
        tokenizer: where the decoder starts; encoder and codebook are taken over as they are.
        drawn_PL: tokens that a teacher drew; none are looked at where `decoder.drawn` is 0.
    """
    cfg, count = recipe.decoder, len(images.images)
    model = new_tokenizer(recipe.tokenizer_model)
    model.load_state_dict(tokenizer.state_dict())
    model = model.to(device=device, memory_format=memory_layout(device))  # type: ignore[call-overload]
    trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    for frozen in set(model.parameters()) - set(trained):
        frozen.requires_grad_(False)
    lpips, adversary = lpips.to(device), Adversary(cfg.judge_lr, recipe.seed, device)
    optimizer = torch.optim.AdamW(
        [{"params": trained, "peak": cfg.lr}], lr=cfg.lr, betas=(0.5, 0.99), weight_decay=0.0
    )
    ema, batches = Ema(model, cfg.ema), Batches(len(tokens_FNL) * count, cfg.batch, recipe.seed)
    codebook = model.codebook_VC.detach()
    parts = parallel.parts(batches.count, recipe.accumulate, "decoder.batch")
    economical(recipe, model.decoder.blocks)

    drawn_PL = tokens_FNL[0, :0] if drawn_PL is None else drawn_PL
    drawn_batches = Batches(len(drawn_PL), cfg.batch, recipe.seed)
    drawn_count = round(cfg.drawn * batches.count)

    def load(step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        chosen, shown, found = batches.at(step), drawn_batches.at(step), []
        for part in parts:
            mirrored, index = chosen[part.rows] >= count, chosen[part.rows] % count
            x, _ = images.batch(index)
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            drawn = drawn_PL[shown[part.rows][: part.among(drawn_count)]]
            found.append((pinned(x, device), tokens_FNL[mirrored.long(), index].long(), drawn.long()))
        return found

    ahead = Ahead(load, cfg.steps)

    def update(step: int) -> dict[str, Tensor]:
        factor, weight = one_cycle(step, cfg.steps, 1.0), cfg.adversarial * ramp(step, cfg.ramp * cfg.steps)
        figures = Figures(device, "l1", "lpips", "fooled", "hinge")
        for image, tokens, drawn in ahead.at(step):
            x, share = copied(image, device), len(image) / batches.count
            with mixed_precision(device):
                codes = lookup(codebook, copied(torch.cat([tokens, drawn]), device))
                recon, unpaired = model.to_image(codes).float().split([len(tokens), len(drawn)])
            found = {"l1": share * (recon - x).abs().mean()}
            found |= perceived(lpips, adversary, x, recon, share, cfg.enlarged, unpaired)
            loss = found["l1"] + cfg.lpips * found["lpips"] + weight * found["fooled"]
            loss.backward()
            figures.add(**found)
        parallel.sum_gradients(trained)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        update_at(optimizer, factor)
        ema.update(model)
        adversary.step(factor)
        return {**figures.total(), "gradient_norm": norm}

    def preview(path: Path) -> None:
        averaged = new_tokenizer(recipe.tokenizer_model).to(device)
        averaged.load_state_dict(ema.average)
        x, _ = images.batch(torch.arange(count)[:32])
        with torch.no_grad():
            recon = averaged.decode_tokens(tokens_FNL[0, :32].long().to(device))
        reconstruction_grid(x, recon, path)

    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
    state |= {"judge": adversary.judge, "judging": adversary.optimizer}
    config = {
        "tokenizer_model": asdict(recipe.tokenizer_model),
        "decoder": asdict(cfg),
        "seed": recipe.seed,
    }
    config |= {"drawn": len(drawn_PL)} if cfg.drawn else {}
    return Stage("decoder", cfg.steps, state, update, batches, preview, plain(config)), ema


def run(run: Run) -> None:
    """Stage (a′): nothing where the recipe gives it no steps."""
    if not run.recipe.decoder.steps:
        return
    with parallel.in_turn():
        tokenizer = load_tokenizer(run)
        tokens, _ = read_tokens(run, tokenizer)
        images, lpips = train_images(run), Lpips(lpips_weights())
        drawn = load_pairs(run.out / FOLDER).tokens if run.recipe.decoder.drawn else None
    stage, ema = decoder_stage(run.recipe, images, tokens, tokenizer, lpips, run.device, drawn)
    train(run, stage, ema, new_tokenizer(run.recipe.tokenizer_model))
