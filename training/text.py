"""The text path's data for the stages: images of pictograms, their captions, and what is held out."""

from __future__ import annotations

import torch

from training import captions, pictograms
from training.data import ImageSet
from training.recipes import Recipe


def train_images(recipe: Recipe) -> ImageSet:
    """All views of the pictures to learn from, view by view; the label is the picture's number.

    `recipe.train_images` keeps the first pictures only; 0 keeps all.
    """
    corpus = pictograms.load()
    kept = [i for i, split in enumerate(captions.splits(corpus)) if split == "train"]
    kept = kept[: recipe.train_images or None]
    images = corpus.images_FN3HW[:, torch.tensor(kept)]
    return ImageSet(images.flatten(0, 1), torch.arange(len(kept)).repeat(len(images)))
