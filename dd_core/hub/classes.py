"""The names of ImageNet's 1,000 classes, in the order of the published models' indices.

Each is the words of a WordNet synset, joined by commas: "tench, Tinca tinca".
"""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def imagenet_classes() -> tuple[str, ...]:
    """1,000 names; "crane" and "maillot" each stand for two classes, as in the data set itself."""
    return tuple((Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines())
