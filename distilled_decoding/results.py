"""The results of the calls: the replies of the contract, with images as bytes."""

from __future__ import annotations

import base64
import builtins
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from distilled_decoding.contract import SUFFIXES, GenerateReply, ImageReply
from distilled_decoding.contract import ImageEvent as ImageEventReply
from distilled_decoding.conversion import converted


class Image(ImageReply):
    """One encoded image; its `receipt` reproduces it."""

    @cached_property
    def bytes(self) -> builtins.bytes:
        """The encoded file."""
        return base64.b64decode(self.data)

    def save(self, path: str | Path) -> Path:
        """Write the file in the format that the suffix names; without a suffix, as received.

        An image that was received in another format is converted, which takes Pillow; its receipt stays in
        the file. With the `format` of the request the server makes it so in the first place.

        Returns:
            The path.

        Raises:
            ValueError: the suffix is of no image format, or of another one and Pillow is not installed.
        """
        path = Path(path)
        wanted = SUFFIXES.get(path.suffix.lower(), self.format)
        if path.suffix and path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path.name} must end in {', '.join(SUFFIXES)}, or have no suffix")
        try:
            data = self.bytes if wanted == self.format else converted(self.bytes, wanted, self.receipt)
        except ImportError:
            raise ValueError(
                f"{path.name} would be {wanted}, and the image was received as {self.format}: request "
                f"format={wanted!r}, give another suffix, or install Pillow"
            ) from None
        path.write_bytes(data)
        return path


class Generation(GenerateReply):
    """The images of one request, with the plan that made them, its steps and the timings."""

    images: Sequence[Image]


class ImageEvent(ImageEventReply):
    """One event of a stream: a complete image; `final` where no better one of the same follows."""

    image: Image


class Plan(BaseModel):
    """A sampler of a model: its cost in forward passes (`steps`) and its measured quality."""

    model_config = ConfigDict(extra="allow")

    name: str
    steps: int
    offered: bool
    metrics: Mapping[str, Any]


class Model(BaseModel):
    """A loaded model: an entry of `GET /models`. Fields that are not declared here are kept, untyped."""

    model_config = ConfigDict(extra="allow")

    name: str
    family: str
    description: str
    conditioning: str
    image: Mapping[str, int]
    classes: Sequence[str]
    steps: Mapping[str, int]
    plans: Sequence[Plan]
    qualities: Mapping[str, str]
    limits: Mapping[str, int]
    determinism_mode: str
    licence: str
    weights: str


class Models(BaseModel):
    """The reply of `GET /models`."""

    models: list[Model]
