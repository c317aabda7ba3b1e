"""`tokens.safetensors` of a run: the codes of all training images and of their mirror images.

Shapes: N images, L tokens.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dd_core.errors import RecipeError
from dd_core.files import save_tensors
from dd_core.models.build import AnyTokenizer
from training import parallel
from training.data import pictograms
from training.data.images import ImageSet
from training.data.sources import load_images
from training.digest import weights_digest
from training.run import Run, facts_in, facts_of, load_tokenizer, read

log = logging.getLogger("dd_train")


def train_images(run: Run) -> ImageSet:
    """The images that the run learns from: all that there are, or the first ones of a small recipe."""
    images, _ = load_images(run)
    of_pictures = run.recipe.data == "pictograms"  # whose views were chosen by picture
    return images.first(0 if of_pictures else run.recipe.train_images)


def write_tokens(run: Run) -> None:
    """`tokens.safetensors`: the codes of all training images and of their mirror images."""
    images = train_images(run)
    mirrored = run.recipe.mirror and run.recipe.data != "pictograms"  # which have such views of their own
    tokenizer = load_tokenizer(run)
    tokens = encode_all(tokenizer, images, run.device, mirrored=mirrored)
    if parallel.is_main():
        save_tensors(
            {"tokens": tokens, "labels": images.labels.to(torch.int32)},
            run.out / "tokens.safetensors",
            facts_of({**_images_of(run), "tokenizer": weights_digest(tokenizer)}),
        )
    parallel.barrier()
    used = len(torch.unique(tokens))
    log.info(
        "tokenizer: %d of %d codes occur in the training images",
        used,
        run.recipe.tokenizer_model.codebook_size,
    )


def read_tokens(run: Run, tokenizer: AnyTokenizer | None = None) -> tuple[Tensor, Tensor]:
    """Codes `[2 or 1, N, L]` and labels `[N]` int64 of the training images.

    Args:
        tokenizer: whose codes they must be; None = whoever's.

    Raises:
        RecipeError: they are not there yet, or are of other images or of another tokenizer.
    """
    found = read(run, "tokens", "tokenizer", _images_of(run))
    path = run.out / "tokens.safetensors"
    maker = facts_in(path).get("tokenizer")
    if tokenizer is not None and maker is not None and maker != weights_digest(tokenizer):
        raise RecipeError(
            f"{path} holds codes of another tokenizer than the run has now: run "
            f"`{run.command('tokenizer')}` to its end",
            param="out",
        )
    return found["tokens"], found["labels"].long()


def _images_of(run: Run) -> dict[str, object]:
    """The settings that say which images the tokens are of."""
    recipe = run.recipe
    found: dict[str, object] = {
        "data": recipe.data,
        "train_images": recipe.train_images,
        "views": recipe.views,
    }
    found |= {} if recipe.mirror else {"mirror": False}
    found |= {"corpus": pictograms.digest()} if recipe.data == "pictograms" else {}
    return found | ({} if recipe.folder is None else {"folder": recipe.folder.digest})


@torch.no_grad()
def encode_all(
    model: AnyTokenizer,
    images: ImageSet,
    device: torch.device,
    batch: int | None = None,
    *,
    mirrored: bool = True,
) -> Tensor:
    """Tokens of every image and (with `mirrored`) of its mirror image: `[2 or 1, N, L]` int16 or int32.

    `batch` images at a time; None = as many as 500 of 32 pixels are. Every rank calls it, encodes its share,
    and has all.
    """
    batch = batch or max(1, 500 * 32 * 32 // images.images[0, 0].numel())
    count, flips = len(images.images), (False, True) if mirrored else (False,)
    length = model.encode(images.batch(torch.arange(1))[0].to(device)).shape[1]
    tokens = torch.zeros(len(flips), count, length, dtype=torch.int32)
    for i in range(0, count, batch)[parallel.own_rows()]:
        index = torch.arange(i, min(i + batch, count))
        x, _ = images.batch(index)
        for row, flip in zip(tokens, flips, strict=True):
            row[index] = model.encode((x.flip(3) if flip else x).to(device)).cpu().int()
    return parallel.summed(tokens).to(torch.int16 if model.cfg.codebook_size <= 2**15 else torch.int32)
